//! Plain loops, compiled once for each instruction set.

/// Turns `fn name(args) { body }` into `fn name(level, args)`, whose body was compiled for each
/// [`Level`](super::simd::Level). The bodies are plain loops that compilers vectorise; since floats
/// are neither fused nor reordered, all give the same bits.
macro_rules! levels {
    ($($(#[$doc:meta])* $vis:vis fn $name:ident($($arg:ident: $type:ty),* $(,)?) $body:block)*) => {$(
        $(#[$doc])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name(level: $crate::cpu::simd::Level, $($arg: $type),*) {
            #[inline(always)]
            #[allow(clippy::too_many_arguments)]
            fn plain($($arg: $type),*) $body
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            #[allow(clippy::too_many_arguments)]
            fn avx2($($arg: $type),*) { plain($($arg),*) }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
            #[allow(clippy::too_many_arguments)]
            fn avx512($($arg: $type),*) { plain($($arg),*) }
            match level {
                $crate::cpu::simd::Level::Scalar => plain($($arg),*),
                // NEON is what every function there is compiled for.
                #[cfg(target_arch = "aarch64")]
                $crate::cpu::simd::Level::Neon
                | $crate::cpu::simd::Level::Dotprod
                | $crate::cpu::simd::Level::I8mm => plain($($arg),*),
                // SAFETY: a `Level` is had only by a machine that has its instruction set.
                #[cfg(target_arch = "x86_64")]
                $crate::cpu::simd::Level::Avx2 | $crate::cpu::simd::Level::AvxVnni => unsafe { avx2($($arg),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                $crate::cpu::simd::Level::Avx512 => unsafe { avx512($($arg),*) },
            }
        }
    )*};
}
pub(super) use levels;
