// SPDX-License-Identifier: GPL-2.0-only
/* The memory that the kernel's code takes for the machine's (libc only). */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include "gp.h"

typedef unsigned long ul;
#define K4 0x1000UL
#define M2 0x200000UL
#define PHYS0 0x100000000UL		/* "physical" address of the arena */

void *gp_map_memory(ul bytes)
{
	ul sz = (bytes + 2 * M2 - 1) & ~(M2 - 1);
	char *p = mmap(NULL, sz, PROT_READ | PROT_WRITE,
		       MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (p == MAP_FAILED) {
		perror("mmap");
		exit(1);
	}
	p = (char *)(((ul)p + M2 - 1) & ~(M2 - 1));
	/* The kernel's direct map uses large pages; ask for the same. */
	if (!getenv("GP_NOTHP"))
		madvise(p, bytes, MADV_HUGEPAGE);
	memset(p, 0, bytes);
	return p;
}

void gp_setup_memory(ul table_pages)
{
	char *arena = gp_map_memory(table_pages * K4);
	char *pages = gp_map_memory(table_pages * gp_struct_page_size());

	phys_base = 0;
	page_offset_base = (ul)arena - PHYS0;
	vmemmap_base = (ul)pages - (PHYS0 / K4) * gp_struct_page_size();
	gp_pool_init(arena, table_pages);
}
