#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-only
# Build the user-space programs around the kernel's drivers/iommu/generic_pt.
#
#   build.sh KERNEL_SOURCE [OUTPUT_DIR]     prints the program's path
#
# FLAVOUR=kernel (default)  gpbench-kernel, with the flags kbuild gives the files
# FLAVOUR=user              gpbench-user: -O2 without kernel-only code-gen options
# FLAVOUR=native            gpbench-native: as user, with -O3 -march=native
# FLAVOUR=check             gpdrive: as user, with the kernel's assertions for this
#                           code (DEBUG_GENERIC_PT)
#
# CC picks the compiler; KCC, if set, only that of the kernel-side files.
#
# A configured and prepared tree (include/generated/autoconf.h present) is used
# in place and never written to; an unconfigured one is configured and prepared
# out of tree under OUTPUT_DIR/kbuild.
set -eu
[ $# -ge 1 ] || { sed -n '3,18p' "$0"; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
src=$(cd "$1" && pwd)
out=${2:-$(mktemp -d)}
mkdir -p "$out"
out=$(cd "$out" && pwd)
CC=${CC:-gcc}
KCC=${KCC:-$CC}
FLAVOUR=${FLAVOUR:-kernel}
jobs=${JOBS:-2}

if [ -f "$src/include/generated/autoconf.h" ]; then
	kb=$src
else
	kb=$out/kbuild
	if [ ! -f "$kb/prepared" ]; then
		mkdir -p "$kb"
		make -s -C "$src" O="$kb" CC="$CC" defconfig
		"$src/scripts/config" --file "$kb/.config" \
			-e COMPILE_TEST -e EXPERT -e DEBUG_KERNEL \
			-e RUNTIME_TESTING_MENU -e FAULT_INJECTION \
			-e IOMMU_SUPPORT -e INTEL_IOMMU -e AMD_IOMMU \
			-e IOMMUFD -e IOMMUFD_TEST \
			-e GENERIC_PT -e IOMMU_PT -e IOMMU_PT_AMDV1 \
			-e IOMMU_PT_VTDSS -e IOMMU_PT_X86_64 \
			-e IOMMU_PT_RISCV64 -d DEBUG_GENERIC_PT \
			-d CPU_MITIGATIONS -d FUNCTION_TRACER -d FTRACE \
			-d STACKPROTECTOR -d FORTIFY_SOURCE -d LIST_HARDENED \
			-d DEBUG_LIST -d MODVERSIONS -d WERROR -d NUMA \
			-d AMD_MEM_ENCRYPT
		make -s -C "$src" O="$kb" CC="$CC" olddefconfig
		make -s -C "$src" O="$kb" CC="$CC" -j"$jobs" prepare
		touch "$kb/prepared"
	fi
fi
for o in SMP GENERIC_PT IOMMU_PT IOMMUFD IOMMUFD_DRIVER IOMMUFD_TEST; do
	grep -q "define CONFIG_$o 1" "$kb/include/generated/autoconf.h" ||
		echo "warning: CONFIG_$o is not set in that tree" >&2
done
for o in DEBUG_GENERIC_PT DEBUG_VIRTUAL DEBUG_LIST LIST_HARDENED KASAN UBSAN \
	 STACKPROTECTOR FUNCTION_TRACER AMD_MEM_ENCRYPT; do
	! grep -q "define CONFIG_$o 1" "$kb/include/generated/autoconf.h" ||
		echo "warning: CONFIG_$o is set in that tree" >&2
done

inc="-nostdinc -I$src/arch/x86/include -I$kb/arch/x86/include/generated
 -I$src/include -I$kb/include
 -I$src/arch/x86/include/uapi -I$kb/arch/x86/include/generated/uapi
 -I$src/include/uapi -I$kb/include/generated/uapi
 -include $src/include/linux/compiler-version.h
 -include $src/include/linux/kconfig.h
 -include $src/include/linux/compiler_types.h
 -D__KERNEL__"
# language and ABI: needed by the headers in every flavour
base="-std=gnu11 -fms-extensions -fshort-wchar -funsigned-char -fno-common
 -fno-PIE -fno-strict-aliasing -m64 -mcmodel=small -fno-builtin-wcslen
 -fno-delete-null-pointer-checks -fno-strict-overflow
 -fno-asynchronous-unwind-tables -fno-stack-protector
 -fno-allow-store-data-races -Wno-pointer-sign
 -Wno-address-of-packed-member -Wno-attributes"
clang=
if $KCC --version | grep -q clang; then
	clang=1
	base="$base -Qunused-arguments -Wno-unknown-warning-option -Wno-gnu
 -Wno-microsoft-anon-tag -Wno-ignored-optimization-argument"
	base=$(echo $base | sed 's/-fno-allow-store-data-races//')
fi
case $FLAVOUR in
kernel) opt="-O2 -march=x86-64 -mtune=generic
 -mno-sse -mno-mmx -mno-sse2 -mno-3dnow -mno-avx -mno-sse4a -mno-80387
 -mno-fp-ret-in-387 -mpreferred-stack-boundary=3 -mskip-rax-setup
 -mno-red-zone -fcf-protection=branch -fno-jump-tables
 -falign-jumps=1 -falign-loops=1 -falign-functions=16
 -fno-omit-frame-pointer -fno-optimize-sibling-calls
 -ftrivial-auto-var-init=zero -fno-stack-clash-protection
 -fno-stack-check -fconserve-stack" ;;
user|check)
	opt="-O2 -march=x86-64 -mtune=generic -fcf-protection=none" ;;
native)	opt="-O3 -march=native -fcf-protection=none" ;;
*)	echo "unknown FLAVOUR=$FLAVOUR" >&2; exit 2 ;;
esac
if [ -n "$clang" ]; then
	opt=$(echo $opt | sed 's/-fconserve-stack//; s/-mskip-rax-setup//
		s/-mpreferred-stack-boundary=3/-mstack-alignment=8/
		s/-mno-fp-ret-in-387//; s/-falign-jumps=1//
		s/-fno-stack-check//; s/-falign-loops=1//')
fi

# kernel_cc NAME FLAGS... SOURCE: compiles a kernel-side file to FLAVOUR-NAME.o
kernel_cc() {
	name=$1
	shift
	debug=
	case $FLAVOUR-$name in
	# It asserts that it has no level 6, which it has.
	check-*_amdv1) ;;
	check-*) debug=-DCONFIG_DEBUG_GENERIC_PT=1 ;;
	esac
	$KCC $inc $base $opt $debug -DKBUILD_MODFILE='"'$name'"' \
		-DKBUILD_BASENAME='"'$name'"' -DKBUILD_MODNAME='"'$name'"' \
		-D__KBUILD_MODNAME=$name -c -o "$out/$FLAVOUR-$name.o" "$@"
}
# program NAME OBJECT...: links a program
program() {
	name=$1
	shift
	$CC -no-pie -z noexecstack -o "$out/$name" "$@"
	echo "$out/$name"
}

pt=$src/drivers/iommu/generic_pt
formats=
for f in vtdss amdv1 x86_64 riscv64 mock; do
	kernel_cc iommu_$f "$pt/fmt/iommu_$f.c"
	formats="$formats $out/$FLAVOUR-iommu_$f.o"
done
kernel_cc glue -I"$src/drivers/iommu" -I"$here" "$here/glue.c"
o=$out/$FLAVOUR
# libc_cc NAME...: compiles the files that know nothing of the kernel
libc_cc() {
	for name; do
		$CC -std=gnu11 -O2 -Wall -Wextra -fno-pie \
			-c -o "$o-$name.o" "$here/$name.c"
	done
}
if [ "$FLAVOUR" != check ]; then
	libc_cc arena main
	program "gpbench-$FLAVOUR" $o-main.o $o-arena.o $o-glue.o $formats
	exit
fi

dumps=
# dump FAMILY HEADER FLAGS...
dump() {
	family=$1
	header=$2
	shift 2
	kernel_cc dump_$family -I"$pt" -I"$here" -DGP_DUMP=gp_dump_$family \
		-DGP_FORMAT_HEADER='"fmt/'$header.h'"' -DGP_FORMAT=$header \
		"$@" "$here/dump.c"
	dumps="$dumps $o-dump_$family.o"
}
dump vtdss vtdss
dump amdv1 amdv1
dump x86_64 x86_64
dump riscv64 riscv -DGP_VARIANT=64
dump mock amdv1 -DGP_VARIANT=mock -DAMDV1_IOMMUFD_SELFTEST=1
libc_cc arena driver
program gpdrive $o-driver.o $o-arena.o $o-glue.o $formats $dumps
