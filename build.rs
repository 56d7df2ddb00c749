//! With the feature `header`: writes `include/mor.h` anew from `src/ffi/`. Without it: nothing.

fn main() {
    println!("cargo::rerun-if-changed=src/ffi");
    println!("cargo::rerun-if-changed=cbindgen.toml");
    #[cfg(feature = "header")]
    header::write();
}

#[cfg(feature = "header")]
mod header {
    use std::path::PathBuf;

    pub fn write() {
        let root = PathBuf::from(std::env::var_os("CARGO_MANIFEST_DIR").expect("set by cargo"));
        let config =
            cbindgen::Config::from_file(root.join("cbindgen.toml")).expect("cbindgen.toml");
        let bindings = cbindgen::Builder::new()
            .with_config(config)
            .with_src(root.join("src/ffi/mod.rs"))
            .generate()
            .expect("src/ffi is C");
        // Left alone when it is the same, so that nothing is built anew for it.
        bindings.write_to_file(root.join("include/mor.h"));
    }
}
