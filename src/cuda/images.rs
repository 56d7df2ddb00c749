//! The built kernels (tools/cuda/build.py; docs/cuda.md says which device takes which).

use super::driver::Device;
use crate::error::{Error, Result};

/// The bytes of an image, aligned as cubins want it, with a zero byte behind them, which ends PTX.
macro_rules! image {
    ($name:literal) => {{
        const BYTES: &[u8] = include_bytes!(concat!("images/", $name));
        #[repr(C, align(64))]
        struct Aligned([u8; BYTES.len() + 1]);
        static IMAGE: Aligned = Aligned({
            let mut bytes = [0; BYTES.len() + 1];
            let (all, _) = bytes.split_at_mut(BYTES.len());
            all.copy_from_slice(BYTES);
            bytes
        });
        &IMAGE.0
    }};
}

/// The kernels for a device: built for it, or PTX that its driver compiles.
pub(super) fn for_device(device: &Device) -> Result<&'static [u8]> {
    Ok(match device.architecture {
        72 => image!("sm_72.cubin"),
        80 | 86 | 89 => image!("sm_80.cubin"),
        87 => image!("sm_87.cubin"),
        90 => image!("sm_90.cubin"),
        70..80 => image!("compute_70.ptx"),
        81.. => image!("compute_80.ptx"),
        old => {
            return Err(Error::device(format_args!(
                "the GPU has compute capability {}.{}, but 7.0 is needed; run on the CPU",
                old / 10,
                old % 10
            )));
        }
    })
}

/// The kernel that sets the conditions of graphs.
pub(super) fn conditional() -> &'static [u8] {
    image!("conditional.ptx")
}
