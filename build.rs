//! With the feature `header`: writes `include/mor.h` anew from `src/ffi/`. For Android: how to link.

fn main() {
    println!("cargo::rerun-if-changed=src/ffi");
    println!("cargo::rerun-if-changed=cbindgen.toml");
    align_to_16_kib();
    #[cfg(feature = "header")]
    {
        println!("cargo::rerun-if-changed=include/mor.h");
        header::write();
    }
}

/// Android devices with pages of 16 KiB load no 64-bit library that is aligned to less. Libraries for
/// Java on Linux are linked alike, so that what is tested there is what is shipped.
fn align_to_16_kib() {
    let is = |name: &str, value: &str| std::env::var(name).is_ok_and(|found| found == value);
    let java = std::env::var_os("CARGO_FEATURE_JNI").is_some();
    let os = |name: &str| is("CARGO_CFG_TARGET_OS", name);
    if is("CARGO_CFG_TARGET_POINTER_WIDTH", "64") && (os("android") || (java && os("linux"))) {
        println!("cargo::rustc-link-arg=-Wl,-z,max-page-size=16384");
    }
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
