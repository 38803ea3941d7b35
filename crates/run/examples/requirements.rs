//! Prints what this machine offers: `cargo run -p ioasid-run --example requirements`

fn main() {
    for requirement in ioasid_run::requirements::check() {
        println!("{requirement}");
    }
}
