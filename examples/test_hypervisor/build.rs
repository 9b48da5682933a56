//! Links the image: no C runtime, no loader, our own layout.

fn main() {
    let folder = std::env::var("CARGO_MANIFEST_DIR").unwrap_or_else(|_| ".".to_owned());
    let script = format!("-Wl,-T,{folder}/link.ld");
    let fixed = ["-nostartfiles", "-nostdlib", "-static", "-no-pie", "-Wl,-z,max-page-size=4096"];
    for argument in fixed.into_iter().chain(["-Wl,--build-id=none", script.as_str()]) {
        println!("cargo::rustc-link-arg-bins={argument}");
    }
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=link.ld");
}
