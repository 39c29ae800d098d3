//! Instruction sets, chosen at run time.
//!
//! An algorithm is written once, as an `#[inline(always)]` body that is generic over an instruction
//! set token ([`Isa`]). [`multiversion!`] makes a thin entry per instruction set, in which the
//! compiler may use that set for the whole body, and a function that picks the entry by
//! [`Backend`]. Where an instruction set needs code of its own, a module adds a trait to the
//! tokens. Results never depend on the backend: the tests run all of them, and no set enables fused
//! multiply-add.

pub(crate) mod doubles;
pub(crate) mod lanes;

use std::env::{self, VarError};
use std::str::FromStr;
use std::sync::OnceLock;

use crate::error::{CodecError, Result, config_error};

/// The environment variable that forces a backend.
pub const BACKEND_VARIABLE: &str = "DISTILLKIT_SIMD";

/// An instruction set that the codec's loops are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Backend {
    /// What every CPU of the target has.
    Portable,
    /// x86-64 with AVX2, BMI1, BMI2, F16C, LZCNT and POPCNT (Haswell, Zen and later).
    Avx2,
    /// [`Avx2`](Self::Avx2) and AVX-512 F, BW, DQ, IFMA, VL, VBMI and VBMI2 (Ice Lake, Zen 4 and
    /// later).
    Avx512,
    /// 64-bit ARM with NEON.
    Neon,
}

impl Backend {
    /// Every backend, slowest first.
    pub const ALL: [Self; 4] = [Self::Portable, Self::Avx2, Self::Avx512, Self::Neon];

    /// The fastest backend of this CPU.
    #[must_use]
    pub fn detect() -> Self {
        let best = Self::ALL.into_iter().rev().find(|backend| backend.is_available());
        best.unwrap_or(Self::Portable)
    }

    /// The backends of this CPU, slowest first.
    #[must_use]
    pub fn available() -> Vec<Self> {
        Self::ALL.into_iter().filter(|backend| backend.is_available()).collect()
    }

    /// Whether this CPU has the backend's instructions. Looked up once; cheap afterwards.
    #[must_use]
    #[inline]
    pub fn is_available(self) -> bool {
        static AVAILABLE: OnceLock<[bool; 4]> = OnceLock::new();
        self == Self::Portable
            || AVAILABLE.get_or_init(|| Self::ALL.map(Self::cpu_has))[self as usize]
    }

    #[cfg(target_arch = "x86_64")]
    fn cpu_has(self) -> bool {
        use std::arch::is_x86_feature_detected as has;
        match self {
            Self::Portable => true,
            Self::Neon => false,
            Self::Avx2 => {
                has!("avx2")
                    && has!("bmi1")
                    && has!("bmi2")
                    && has!("f16c")
                    && has!("lzcnt")
                    && has!("popcnt")
            }
            Self::Avx512 => {
                let base = Self::Avx2.cpu_has()
                    && has!("avx512f")
                    && has!("avx512bw")
                    && has!("avx512dq")
                    && has!("avx512vl");
                base && has!("avx512ifma") && has!("avx512vbmi") && has!("avx512vbmi2")
            }
        }
    }

    #[cfg(target_arch = "aarch64")]
    fn cpu_has(self) -> bool {
        match self {
            Self::Portable => true,
            Self::Avx2 | Self::Avx512 => false,
            Self::Neon => std::arch::is_aarch64_feature_detected!("neon"),
        }
    }

    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    fn cpu_has(self) -> bool {
        self == Self::Portable
    }

    /// The name that [`FromStr`] and `DISTILLKIT_SIMD` take.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Neon => "neon",
        }
    }

    /// The backend that the environment variable `DISTILLKIT_SIMD` names, or the fastest one if it
    /// is not set.
    ///
    /// Fails with [`CodecError::Config`] when the variable names no backend or one that this CPU
    /// lacks.
    pub fn from_env() -> Result<Self> {
        match env::var(BACKEND_VARIABLE) {
            Ok(name) => Self::forced(&name),
            Err(VarError::NotPresent) => Ok(Self::detect()),
            Err(VarError::NotUnicode(raw)) => Self::forced(&raw.to_string_lossy()),
        }
    }

    fn forced(name: &str) -> Result<Self> {
        match name.parse::<Self>() {
            Ok(backend) if backend.is_available() => Ok(backend),
            Ok(_) => config_error(
                BACKEND_VARIABLE,
                format!("this CPU has no {name}; it has {}", names(&Self::available())),
            ),
            Err(_) => {
                let known = names(&Self::available());
                config_error(
                    BACKEND_VARIABLE,
                    format!(
                        "{name:?} is not a backend; this CPU has {known} (unset it for the fastest)"
                    ),
                )
            }
        }
    }
}

fn names(backends: &[Backend]) -> String {
    backends.iter().map(|backend| backend.name()).collect::<Vec<_>>().join(", ")
}

impl FromStr for Backend {
    type Err = CodecError;

    /// Fails with [`CodecError::Config`] on any name but `portable`, `avx2`, `avx512` and `neon`.
    fn from_str(name: &str) -> Result<Self> {
        let named = Self::ALL.into_iter().find(|backend| backend.name() == name);
        named.map_or_else(
            || config_error("simd backend", format!("{name:?} is none of {}", names(&Self::ALL))),
            Ok,
        )
    }
}

/// Proof that the CPU has an instruction set, and its name at compile time.
///
/// Only [`multiversion!`] makes tokens other than [`Portable`], so whoever holds one may call
/// functions that need the instructions.
pub(crate) trait Isa: Copy {
    /// The backend that the token belongs to.
    const BACKEND: Backend;
}

macro_rules! tokens {
    ($($(#[$attribute:meta])* $name:ident),+) => {$(
        $(#[$attribute])*
        #[derive(Clone, Copy)]
        pub(crate) struct $name(());

        $(#[$attribute])*
        impl $name {
            /// # Safety
            /// `Backend::is_available` must be true for this backend.
            #[inline(always)]
            pub(crate) const unsafe fn assume() -> Self {
                Self(())
            }
        }

        $(#[$attribute])*
        impl Isa for $name {
            const BACKEND: Backend = Backend::$name;
        }
    )+};
}

tokens!(
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "aarch64")]
    Neon
);

/// The token that needs nothing.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

impl Isa for Portable {
    const BACKEND: Backend = Backend::Portable;
}

/// Makes one function per instruction set from an `#[inline(always)]` body, and one that chooses by
/// [`Backend`].
///
/// ```ignore
/// #[inline(always)]
/// fn sum_body<I: Isa, T: Number>(isa: I, values: &[T]) -> f32 { … }
///
/// multiversion! {
///     /// The sum of `values`.
///     pub(crate) fn sum<T: Number>(values: &[T]) -> f32 = sum_body;
/// }
///
/// sum(Backend::detect(), &[1.0, 2.0])
/// ```
/// The choice is one load and one jump. It panics when the CPU lacks the backend: check what comes
/// from outside by [`Backend::is_available`] where it enters. Closures and functions called by the
/// body use the instruction set only where they are inlined into it, so what runs on other threads
/// must choose again there. A body calls another body with its own token, at no cost.
macro_rules! multiversion {
    (
        $(#[$attribute:meta])*
        $visibility:vis fn $name:ident $(<$($generic:ident : $bound:path),+>)?
            ($($argument:ident : $kind:ty),* $(,)?) $(-> $result:ty)? = $body:path;
    ) => {
        $(#[$attribute])*
        #[inline]
        $visibility fn $name $(<$($generic: $bound),+>)?
            (backend: $crate::simd::Backend, $($argument: $kind),*) $(-> $result)? {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,bmi1,bmi2,f16c,lzcnt,popcnt")]
            fn avx2 $(<$($generic: $bound),+>)? ($($argument: $kind),*) $(-> $result)? {
                // SAFETY: this function is called after the check below only.
                $body(unsafe { $crate::simd::Avx2::assume() }, $($argument),*)
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(
                enable = "avx2,bmi1,bmi2,f16c,lzcnt,popcnt",
                enable = "avx512f,avx512bw,avx512dq,avx512ifma,avx512vl,avx512vbmi,avx512vbmi2"
            )]
            fn avx512 $(<$($generic: $bound),+>)? ($($argument: $kind),*) $(-> $result)? {
                // SAFETY: as above.
                $body(unsafe { $crate::simd::Avx512::assume() }, $($argument),*)
            }
            #[cfg(target_arch = "aarch64")]
            #[target_feature(enable = "neon")]
            fn neon $(<$($generic: $bound),+>)? ($($argument: $kind),*) $(-> $result)? {
                // SAFETY: as above.
                $body(unsafe { $crate::simd::Neon::assume() }, $($argument),*)
            }

            assert!(backend.is_available(), "this CPU has no {}", backend.name());
            match backend {
                // SAFETY: checked above; the features are those that `Backend::cpu_has` looks for.
                #[cfg(target_arch = "x86_64")]
                $crate::simd::Backend::Avx2 => unsafe { avx2($($argument),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                $crate::simd::Backend::Avx512 => unsafe { avx512($($argument),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "aarch64")]
                $crate::simd::Backend::Neon => unsafe { neon($($argument),*) },
                _ => $body($crate::simd::Portable, $($argument),*),
            }
        }
    };
}
pub(crate) use multiversion;

#[cfg(test)]
mod tests {
    use super::*;

    #[inline(always)]
    fn dot_body<I: Isa, T: Copy + Into<f32>>(_isa: I, a: &[T], b: &[T]) -> (Backend, f32) {
        (I::BACKEND, a.iter().zip(b).map(|(&x, &y)| x.into() * y.into()).sum())
    }

    trait Number: Copy + Into<f32> {}
    impl Number for f32 {}

    multiversion! {
        fn dot<T: Number>(a: &[T], b: &[T]) -> (Backend, f32) = dot_body;
    }

    #[test]
    fn every_available_backend_runs_its_own_entry() {
        for backend in Backend::available() {
            assert_eq!(dot(backend, &[1.0f32, 2.0, 3.0], &[4.0, 5.0, 6.0]), (backend, 32.0));
        }
    }

    #[test]
    fn a_backend_the_cpu_lacks_is_refused() {
        let lacking = Backend::ALL.into_iter().find(|backend| !backend.is_available()).unwrap();
        let message = Backend::forced(lacking.name()).unwrap_err().to_string();
        assert!(message.contains(lacking.name()) && message.contains("portable"), "{message}");
        assert!(std::panic::catch_unwind(|| dot(lacking, &[1.0f32], &[1.0])).is_err());
    }

    #[test]
    fn names() {
        for backend in Backend::ALL {
            assert_eq!(backend.name().parse(), Ok(backend));
        }
        for wrong in ["", "AVX2", "sse"] {
            let message = wrong.parse::<Backend>().unwrap_err().to_string();
            assert!(message.contains("portable, avx2, avx512, neon"), "{message}");
            assert!(Backend::forced(wrong).unwrap_err().to_string().starts_with(BACKEND_VARIABLE));
        }
        assert_eq!(Backend::forced(Backend::detect().name()), Ok(Backend::detect()));
        assert!(Backend::available().contains(&Backend::Portable));
    }
}
