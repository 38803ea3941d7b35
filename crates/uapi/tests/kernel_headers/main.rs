//! Compares this crate with the kernel's own headers: the size of every structure, offset and size of every field,
//! every ioctl number, flag and value.
//!
//! [`expectations`] lists what Rust says, each with a C expression for the same thing. From the list a C program is
//! written that prints the values of the expressions; it is compiled against the headers and run, and the two columns
//! are compared. No C parser is needed this way, and the compiler that answers is one that clients use.
//!
//! The headers are found through the variable `IOASID_KERNEL_HEADERS`: directories, separated by `:`, which together
//! hold `linux/iommufd.h`, `linux/vfio.h`, `linux/pci_regs.h` and `iommufd_test.h` (the latter from the kernel's
//! source). `cargo xtask uapi-check` fetches them and sets it. Without the variable nothing is compared and the output
//! says so; with it, anything that keeps the comparison from being made is a failure. The C compiler is `cc`, or what
//! the variable `CC` says.

mod expectations;

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

use expectations::Expectation;

const VARIABLE: &str = "IOASID_KERNEL_HEADERS";
const TEST_NAME: &str = "kernel_headers";

fn main() -> ExitCode {
    let headers = env::var_os(VARIABLE);
    // Test runners ask what there is before they run it. Without headers there is nothing, and so nothing that a
    // runner could count as passed.
    if env::args().any(|argument| argument == "--list") {
        if headers.is_some() && !env::args().any(|argument| argument == "--ignored") {
            println!("{TEST_NAME}: test");
        }
        return ExitCode::SUCCESS;
    }
    let Some(headers) = headers else {
        println!("{TEST_NAME} ... not run: {VARIABLE} is not set (`cargo xtask uapi-check` sets it)");
        return ExitCode::SUCCESS;
    };
    match compare(&env::split_paths(&headers).collect::<Vec<_>>()) {
        Ok(count) => {
            println!("{TEST_NAME} ... ok: {count} sizes, offsets and values are as in the kernel's headers");
            ExitCode::SUCCESS
        }
        Err(message) => {
            eprintln!("{TEST_NAME} ... FAILED\n{message}");
            ExitCode::FAILURE
        }
    }
}

/// Makes the comparison and returns how many values agree, or a text for people that says what does not.
fn compare(directories: &[PathBuf]) -> Result<usize, String> {
    let iommufd = find(directories, "linux/iommufd.h")?;
    for header in ["linux/vfio.h", "linux/pci_regs.h", "iommufd_test.h"] {
        find(directories, header)?;
    }
    let expectations = expectations::all();
    let measured = measure(directories, &expectations)?;
    let differences: Vec<String> = expectations
        .iter()
        .zip(&measured)
        .filter(|(expectation, measured)| expectation.value != **measured)
        .map(|(expectation, measured)| {
            format!(
                "  {}: {measured:#x} in the headers, {:#x} here",
                expectation.expression, expectation.value
            )
        })
        .collect();
    if !differences.is_empty() {
        return Err(format!("{} values differ:\n{}", differences.len(), differences.join("\n")));
    }
    let text = fs::read_to_string(&iommufd)
        .map_err(|error| format!("cannot read {}: {error}", iommufd.display()))?;
    for name in unknown_commands(&text) {
        println!("note: {} has a command that this crate does not know: {name}", iommufd.display());
    }
    Ok(measured.len())
}

/// The first of the directories' files of this name.
fn find(directories: &[PathBuf], header: &str) -> Result<PathBuf, String> {
    directories.iter().map(|directory| directory.join(header)).find(|path| path.is_file()).ok_or_else(|| {
        let searched: Vec<_> = directories.iter().map(|path| path.display().to_string()).collect();
        format!("{VARIABLE} is unusable: there is no {header} in {}", searched.join(" or "))
    })
}

/// The values of all expressions, in their order, as the C compiler has them.
fn measure(directories: &[PathBuf], expectations: &[Expectation]) -> Result<Vec<u64>, String> {
    let work = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("kernel_headers-{}", std::process::id()));
    fs::create_dir_all(&work).map_err(|error| format!("cannot create {}: {error}", work.display()))?;
    let result = compile_and_run(&work, directories, expectations);
    // What is left behind in the build directory after a failure to remove it harms nobody.
    let _ = fs::remove_dir_all(&work);
    let output = result?;
    let values = output
        .lines()
        .map(|line| line.parse().map_err(|_| format!("the C program printed {line:?}, not a number")))
        .collect::<Result<Vec<u64>, _>>()?;
    if values.len() != expectations.len() {
        return Err(format!("the C program printed {} values, not {}", values.len(), expectations.len()));
    }
    Ok(values)
}

fn compile_and_run(
    work: &Path,
    directories: &[PathBuf],
    expectations: &[Expectation],
) -> Result<String, String> {
    let source = work.join("values.c");
    let binary = work.join("values");
    fs::write(&source, c_program(expectations))
        .map_err(|error| format!("cannot write {}: {error}", source.display()))?;
    let compiler = env::var("CC").unwrap_or_else(|_| "cc".to_owned());
    let mut command = Command::new(&compiler);
    for directory in directories {
        command.arg("-I").arg(directory);
    }
    command.arg("-o").arg(&binary).arg(&source);
    let compiled =
        command.output().map_err(|error| format!("cannot run the C compiler {compiler}: {error}"))?;
    if !compiled.status.success() {
        return Err(format!(
            "the headers lack something that this crate has (kernel 7.x is expected), or cannot be compiled:\n{}",
            String::from_utf8_lossy(&compiled.stderr)
        ));
    }
    let output = Command::new(&binary)
        .output()
        .map_err(|error| format!("cannot run {}: {error}", binary.display()))?;
    if !output.status.success() {
        return Err(format!("the C program failed: {}", output.status));
    }
    String::from_utf8(output.stdout).map_err(|error| format!("the C program printed no text: {error}"))
}

fn c_program(expectations: &[Expectation]) -> String {
    let mut program = String::from(
        "#include <stdio.h>\n#include <stddef.h>\n#include <linux/iommufd.h>\n#include <linux/vfio.h>\n\
         #include <linux/pci_regs.h>\n#include <iommufd_test.h>\n\
         static const unsigned long long values[] = {\n",
    );
    for expectation in expectations {
        // Flags such as 1 << 31 are negative in C; the mask makes them the bits that they are.
        let mask = if expectation.bits == 64 { u64::MAX } else { (1 << expectation.bits) - 1 };
        program.push_str(&format!("(unsigned long long)({}) & {mask:#x}ULL,\n", expectation.expression));
    }
    program.push_str(
        "};\nint main(void) {\nfor (size_t i = 0; i < sizeof(values) / sizeof(values[0]); i++)\n\
         printf(\"%llu\\n\", values[i]);\nreturn 0;\n}\n",
    );
    program
}

/// Commands that iommufd's header defines and [`ioasid_uapi::iommufd::COMMANDS`] lacks. A newer kernel's header is no
/// reason to fail, but someone should hear of it.
fn unknown_commands(header: &str) -> Vec<String> {
    let joined = header.replace("\\\n", " ");
    joined
        .lines()
        .filter_map(|line| line.strip_prefix("#define IOMMU_"))
        .filter(|definition| definition.contains("_IO(IOMMUFD_TYPE"))
        .filter_map(|definition| definition.split_whitespace().next())
        .map(|name| format!("IOMMU_{name}"))
        .filter(|name| !ioasid_uapi::iommufd::COMMANDS.iter().any(|command| command.name == name))
        .collect()
}
