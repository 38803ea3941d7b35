//! Fetches a Linux kernel's user headers and the parts of its source that other chores build and read.
//!
//! Kernels as new as the interfaces that we follow come with newer suites of Debian than a developer's machine may run,
//! so the packages are taken from a suite by name, and unpacked beside each other without being installed:
//!
//! ```text
//! target/kernel/SUITE/apt/      a private apt: its source list, indexes and downloads
//!                     headers/  linux-libc-dev, as far as usr/include and usr/lib/linux/uapi
//!                     source/   files of linux-source-X.Y that match MEMBERS and MEMBERS_AT_ANY_DEPTH
//!                     version   of the packages, and those patterns; written last: what is here is complete
//! ```
//!
//! The mirror is read from the machine's own apt configuration, whose settings (a proxy, say) hold for the private apt
//! too. That has an empty package database, so what the machine has installed plays no part, and it writes nothing
//! outside of its directory. Root is not needed; hooks of the machine's configuration may complain without it.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};

use crate::{command, workspace};

/// Parts of the source that are unpacked, as patterns of tar below the tree's top directory: the self-tests, and what
/// an x86 kernel needs to be configured, prepared (`make prepare`), and to have files of `drivers/iommu` compiled. That
/// is a tenth of the whole.
const MEMBERS: &[&str] = &[
    "Makefile",
    "arch/x86",
    "certs",
    "drivers/iommu",
    "include",
    "init",
    "kernel",
    "lib",
    "mm",
    "scripts",
    "security",
    "tools/arch",
    "tools/bpf",
    "tools/build",
    "tools/include",
    "tools/lib",
    "tools/objtool",
    "tools/scripts",
    "tools/testing/selftests/*.h",
    "tools/testing/selftests/iommu",
    "usr",
];
/// The same, where `*` stands for directories too: configuring reads the whole tree's.
const MEMBERS_AT_ANY_DEPTH: &[&str] = &["*Kbuild*", "*Kconfig*", "*Makefile*"];

/// The self-test and its interface are followed from this version on.
const OLDEST_KERNEL: (u32, u32) = (7, 0);

/// Debian packages of this machine that unpack the kernel's.
const UNPACKING: &[&str] = &["tar", "xz-utils"];
/// Debian packages of this machine that compile a C program.
pub(crate) const COMPILING: &[&str] = &["gcc", "libc6-dev"];
/// Debian packages of this machine that compile the kernel's self-tests.
pub(crate) const BUILDING_TESTS: &[&str] = &["gcc", "libc6-dev", "libcap-dev"];
/// Debian packages of this machine that configure and prepare the kernel by its own build system, and compile its files.
pub(crate) const PREPARING: &[&str] =
    &["bc", "bison", "clang-19", "flex", "gcc", "libc6-dev", "libelf-dev", "libssl-dev", "make"];

#[derive(Debug, Clone, clap::Args)]
// Other chores include these arguments in their own; the group of the same name would collide.
#[group(skip)]
pub(crate) struct Arguments {
    /// Suite of Debian to take the kernel from
    #[arg(long, value_name = "SUITE", default_value = "trixie-backports")]
    suite: String,

    /// Look for a newer kernel although one is there
    #[arg(long)]
    refresh: bool,

    /// Install packages that this machine lacks, with apt-get (as root)
    #[arg(long)]
    install: bool,
}

/// An unpacked kernel.
#[derive(Debug)]
pub(crate) struct Kernel {
    directory: PathBuf,
    version: String,
}

impl Kernel {
    /// The kernel's version as Debian has it.
    pub(crate) fn version(&self) -> &str {
        &self.version
    }

    /// Where things that are built from this kernel's source belong.
    pub(crate) fn build_directory(&self) -> PathBuf {
        self.directory.join("build")
    }

    /// Written when this kernel was unpacked.
    pub(crate) fn version_file(&self) -> PathBuf {
        self.directory.join("version")
    }

    /// A file or directory of the source.
    pub(crate) fn source(&self, path: &str) -> PathBuf {
        self.directory.join("source").join(path)
    }

    /// Where a C compiler finds the kernel's headers, in this order.
    pub(crate) fn header_directories(&self) -> Vec<PathBuf> {
        let include = self.directory.join("headers/usr/include");
        // The architecture's part (asm/) is in a directory named as Debian names architectures.
        let architecture = include.join(format!("{}-linux-gnu", std::env::consts::ARCH));
        vec![include, architecture]
    }
}

/// The chore: fetches, and installs or names what the machine lacks for the other chores.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    if arguments.install {
        require_packages(BUILDING_TESTS, true)?;
    }
    let kernel = fetch(arguments, &[])?;
    println!("Linux {} is in {}", kernel.version, kernel.directory.display());
    let missing = missing_packages(BUILDING_TESTS).join(" ");
    if !missing.is_empty() {
        println!("to build its self-tests this machine lacks {missing}; as root: apt-get install {missing}");
    }
    Ok(())
}

/// Brings the kernel here unless it is, after making sure of the Debian packages that the caller needs of this machine.
pub(crate) fn fetch(arguments: &Arguments, packages: &[&str]) -> Result<Kernel> {
    require_packages(&[UNPACKING, packages].concat(), arguments.install)?;
    let directory = workspace::target_directory()?.join("kernel").join(&arguments.suite);
    let stamp = directory.join("version");
    if !arguments.refresh {
        if let Some(version) = unpacked_version(&stamp) {
            return Ok(Kernel { directory, version });
        }
    }
    let apt = PrivateApt::new(&directory.join("apt"), &arguments.suite)?;
    let (package, release) = apt.newest_kernel_source()?;
    if release < OLDEST_KERNEL {
        bail!(
            "{} has {package}, but {}.{} or newer is needed",
            arguments.suite,
            OLDEST_KERNEL.0,
            OLDEST_KERNEL.1
        );
    }
    let version = apt.version(&package)?;
    if unpacked_version(&stamp).as_ref() == Some(&version) {
        eprintln!("{package} {version} is the newest and is here");
        return Ok(Kernel { directory, version });
    }
    if stamp.exists() {
        fs::remove_file(&stamp).with_context(|| format!("cannot remove {}", stamp.display()))?;
    }
    unpack_headers(&apt, &version, &directory.join("headers"))?;
    unpack_source(&apt, &package, &version, &directory)?;
    fs::write(&stamp, stamp_text(&version)).with_context(|| format!("cannot write {}", stamp.display()))?;
    Ok(Kernel { directory, version })
}

/// The version that a stamp names, unless other parts of it were unpacked than are wanted now.
fn unpacked_version(stamp: &Path) -> Option<String> {
    let text = fs::read_to_string(stamp).ok()?;
    let version = text.lines().next()?;
    (text == stamp_text(version)).then(|| version.to_owned())
}

/// The version, and which parts of the source are there.
fn stamp_text(version: &str) -> String {
    [&[version], MEMBERS, MEMBERS_AT_ANY_DEPTH].concat().join("\n") + "\n"
}

fn unpack_headers(apt: &PrivateApt, version: &str, headers: &Path) -> Result<()> {
    let package = apt.download("linux-libc-dev", version)?;
    eprintln!("unpacking headers ...");
    make_empty(headers)?;
    command::run(Command::new("dpkg-deb").arg("--extract").arg(&package).arg(headers))?;
    remove(&package)
}

/// The package holds the source as one compressed archive; only parts of it are kept.
fn unpack_source(apt: &PrivateApt, name: &str, version: &str, directory: &Path) -> Result<()> {
    let package = apt.download(name, version)?;
    eprintln!("unpacking source ...");
    let unpacked = directory.join("unpacked");
    make_empty(&unpacked)?;
    command::run(Command::new("dpkg-deb").arg("--extract").arg(&package).arg(&unpacked))?;
    remove(&package)?;
    let source = directory.join("source");
    make_empty(&source)?;
    let archive = unpacked.join("usr/src").join(format!("{name}.tar.xz"));
    command::run(
        Command::new("tar")
            .arg("--extract")
            .arg("--file")
            .arg(&archive)
            .arg("--directory")
            .arg(&source)
            .args(["--strip-components=1", "--wildcards", "--no-wildcards-match-slash"])
            .args(MEMBERS.iter().map(|member| format!("{name}/{member}")))
            .arg("--wildcards-match-slash")
            .args(MEMBERS_AT_ANY_DEPTH.iter().map(|member| format!("{name}/{member}"))),
    )?;
    fs::remove_dir_all(&unpacked).with_context(|| format!("cannot remove {}", unpacked.display()))
}

fn make_empty(directory: &Path) -> Result<()> {
    if directory.exists() {
        fs::remove_dir_all(directory).with_context(|| format!("cannot remove {}", directory.display()))?;
    }
    fs::create_dir_all(directory).with_context(|| format!("cannot create {}", directory.display()))
}

fn remove(file: &Path) -> Result<()> {
    fs::remove_file(file).with_context(|| format!("cannot remove {}", file.display()))
}

/// Makes sure that packages are installed on this machine.
fn require_packages(packages: &[&str], install: bool) -> Result<()> {
    let missing = missing_packages(packages);
    if missing.is_empty() {
        return Ok(());
    }
    let list = missing.join(" ");
    if !install {
        bail!("this machine lacks {list}; as root: apt-get install {list} (or give --install)");
    }
    if !rustix::process::geteuid().is_root() {
        bail!("this machine lacks {list}, and only root can install them");
    }
    eprintln!("installing {list} ...");
    command::run(Command::new("apt-get").args(["-qq", "update"]))?;
    command::run(
        Command::new("apt-get")
            .env("DEBIAN_FRONTEND", "noninteractive")
            .args(["-qq", "install", "--no-install-recommends", "--yes"])
            .stdout(std::io::stderr())
            .args(&missing),
    )
}

fn missing_packages<'a>(packages: &[&'a str]) -> Vec<&'a str> {
    packages.iter().copied().filter(|package| !is_installed(package)).collect()
}

fn is_installed(package: &str) -> bool {
    let status =
        Command::new("dpkg-query").args(["--show", "--showformat=${db:Status-Status}", package]).output();
    status.is_ok_and(|output| output.stdout == b"installed")
}

/// An apt that has its whole state in one directory and knows one suite.
struct PrivateApt {
    directory: PathBuf,
}

impl PrivateApt {
    /// Writes the configuration and fetches the suite's index.
    fn new(directory: &Path, suite: &str) -> Result<PrivateApt> {
        let mirror = machine_mirror()?;
        for part in ["lists/partial", "cache/archives/partial", "downloads"] {
            let path = directory.join(part);
            fs::create_dir_all(&path).with_context(|| format!("cannot create {}", path.display()))?;
        }
        let keyring = ["debian-archive-keyring.pgp", "debian-archive-keyring.gpg"]
            .iter()
            .map(|name| Path::new("/usr/share/keyrings").join(name))
            .find(|path| path.exists())
            .context("Debian's keys are missing; install debian-archive-keyring")?;
        let apt = PrivateApt { directory: directory.to_owned() };
        fs::write(
            directory.join("sources.list"),
            format!("deb [signed-by={}] {mirror} {suite} main\n", keyring.display()),
        )?;
        // No package counts as installed.
        fs::write(directory.join("status"), "")?;
        eprintln!("reading the index of {suite} ...");
        command::run(apt.command("apt-get").args(["-qq", "update"]))
            .with_context(|| format!("cannot read the index of {suite}"))?;
        Ok(apt)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        let path = |name: &str| self.directory.join(name).display().to_string();
        for option in [
            format!("Dir::Etc::SourceList={}", path("sources.list")),
            "Dir::Etc::SourceParts=/dev/null".to_owned(),
            format!("Dir::State::Lists={}", path("lists")),
            format!("Dir::State::Status={}", path("status")),
            format!("Dir::Cache={}", path("cache")),
            "Acquire::Languages=none".to_owned(),
            // Downloads are made by whoever runs this: apt's own user may not reach this directory.
            "APT::Sandbox::User=root".to_owned(),
        ] {
            command.arg("-o").arg(option);
        }
        command
    }

    /// The newest of the packages linux-source-X.Y, and its X and Y.
    fn newest_kernel_source(&self) -> Result<(String, (u32, u32))> {
        let names = command::output(self.command("apt-cache").args(["pkgnames", "linux-source-"]))?;
        names
            .lines()
            .filter_map(|name| Some((name.to_owned(), kernel_release(name)?)))
            .max_by_key(|(_, release)| *release)
            .context("the suite has no package linux-source-X.Y")
    }

    fn version(&self, package: &str) -> Result<String> {
        let text = command::output(self.command("apt-cache").args(["show", "--no-all-versions", package]))?;
        let version = text.lines().find_map(|line| line.strip_prefix("Version: "));
        Ok(version.with_context(|| format!("apt-cache shows no version of {package}"))?.to_owned())
    }

    /// Downloads one version of a package and returns the file.
    fn download(&self, package: &str, version: &str) -> Result<PathBuf> {
        eprintln!("downloading {package} {version} ...");
        let directory = self.directory.join("downloads");
        make_empty(&directory)?;
        command::run(
            self.command("apt-get")
                .current_dir(&directory)
                .args(["-qq", "download"])
                .arg(format!("{package}={version}")),
        )?;
        let files = fs::read_dir(&directory)?.collect::<Result<Vec<_>, _>>()?;
        let file =
            files.iter().map(fs::DirEntry::path).find(|path| path.extension().is_some_and(|e| e == "deb"));
        file.with_context(|| format!("apt-get download left no package in {}", directory.display()))
    }
}

/// X and Y of "linux-source-X.Y".
fn kernel_release(package: &str) -> Option<(u32, u32)> {
    let (major, minor) = package.strip_prefix("linux-source-")?.split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// The mirror that this machine's apt takes its own release from.
fn machine_mirror() -> Result<String> {
    let release = fs::read_to_string("/etc/os-release").context("cannot read /etc/os-release")?;
    let codename = os_release_value(&release, "VERSION_CODENAME")
        .context("/etc/os-release names no VERSION_CODENAME; this chore needs Debian")?;
    let targets = command::output(Command::new("apt-get").args([
        "indextargets",
        "--format",
        "$(CODENAME) $(REPO_URI)",
        "Created-By: Packages",
    ]))
    .context("this chore needs Debian's apt")?;
    let mirror = targets.lines().find_map(|line| match line.split_once(' ') {
        Some((name, uri)) if name == codename => Some(uri.to_owned()),
        _ => None,
    });
    mirror.with_context(|| format!("this machine's apt has no source for {codename}"))
}

/// The value of a variable in the text of os-release.
fn os_release_value<'a>(text: &'a str, variable: &str) -> Option<&'a str> {
    let value = text.lines().find_map(|line| line.strip_prefix(variable)?.strip_prefix('='))?;
    Some(value.trim_matches(['"', '\'']))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_packages_by_number() {
        assert_eq!(kernel_release("linux-source-7.3"), Some((7, 3)));
        assert!(kernel_release("linux-source-7.10") > kernel_release("linux-source-7.9"));
        assert_eq!(kernel_release("linux-source-7.3-rt"), None);
        assert_eq!(kernel_release("linux-source"), None);
    }

    #[test]
    fn values_of_os_release() {
        let text = "NAME=\"Debian GNU/Linux\"\nVERSION_CODENAME=trixie\nVERSION_CODENAME_OTHER=x\n";
        assert_eq!(os_release_value(text, "VERSION_CODENAME"), Some("trixie"));
        assert_eq!(os_release_value(text, "NAME"), Some("Debian GNU/Linux"));
        assert_eq!(os_release_value(text, "ID"), None);
    }
}
