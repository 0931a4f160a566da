//! Which instruction sets this machine has, and running a body for one of them. No words of any: they are
//! simd.rs's, x86.rs's, x86_avx2.rs's and amx.rs's.

use super::simd::{Body, Scalar};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Level {
    Scalar,
    ScalarUnit,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx2Vnni,
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni,
    #[cfg(target_arch = "x86_64")]
    Avx512Dot,
    #[cfg(target_arch = "x86_64")]
    Amx,
}

/// An instruction set that this machine has: only detection makes one, so holding it is proof.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Isa(Level);

impl Isa {
    /// Plain Rust with `f32::mul_add`: the twin that every other path must equal bit for bit.
    pub const SCALAR: Isa = Isa(Level::Scalar);
    /// The same with a matrix unit in plain Rust: the twin of paths that have one, whose products of bf16 add
    /// up in an order of their own.
    pub const SCALAR_UNIT: Isa = Isa(Level::ScalarUnit);

    /// The fastest that this machine has.
    pub fn detect() -> Isa {
        Isa::available().into_iter().max().unwrap_or(Isa::SCALAR)
    }

    /// Whose results are this one's bit for bit.
    pub fn twin(self) -> Isa {
        if self.has_unit() {
            Isa::SCALAR_UNIT
        } else {
            Isa::SCALAR
        }
    }

    /// Products of bf16 and of bytes go to a matrix unit.
    pub(super) fn has_unit(self) -> bool {
        match self.0 {
            Level::ScalarUnit => true,
            #[cfg(target_arch = "x86_64")]
            Level::Amx => true,
            _ => false,
        }
    }

    /// Products of bf16 have an instruction of their own.
    pub fn has_bf16(self) -> bool {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Level::Avx512Dot | Level::Amx => true,
            _ => false,
        }
    }

    /// All that this machine has, the scalar twins first.
    pub fn available() -> Vec<Isa> {
        #[cfg_attr(not(target_arch = "x86_64"), allow(unused_mut))]
        let mut found = vec![Isa::SCALAR, Isa::SCALAR_UNIT];
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::is_x86_feature_detected as has;
            if has!("avx2") && has!("fma") && has!("f16c") {
                found.push(Isa(Level::Avx2));
                if has!("avxvnni") {
                    found.push(Isa(Level::Avx2Vnni));
                }
                if has!("avx512f") && has!("avx512bw") && has!("avx512vl") && has!("avx512dq") {
                    found.push(Isa(Level::Avx512));
                    if has!("avx512vnni") {
                        found.push(Isa(Level::Avx512Vnni));
                        if has!("avx512bf16") {
                            found.push(Isa(Level::Avx512Dot));
                            if super::amx::granted() {
                                found.push(Isa(Level::Amx));
                            }
                        }
                    }
                }
            }
        }
        found
    }

    pub fn name(self) -> &'static str {
        match self.0 {
            Level::Scalar => "scalar",
            Level::ScalarUnit => "scalar with a unit",
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Level::Avx2Vnni => "avx2_vnni",
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => "avx512",
            #[cfg(target_arch = "x86_64")]
            Level::Avx512Vnni => "avx512_vnni",
            #[cfg(target_arch = "x86_64")]
            Level::Avx512Dot => "avx512_bf16",
            #[cfg(target_arch = "x86_64")]
            Level::Amx => "amx",
        }
    }

    /// Runs a body compiled for this instruction set.
    #[inline]
    pub(super) fn call<B: Body>(self, body: B) -> B::Out {
        match self.0 {
            Level::Scalar | Level::ScalarUnit => body.run::<Scalar>(),
            // SAFETY: an Isa exists only after its features were detected.
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => unsafe { super::x86_avx2::call_avx2(body) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Level::Avx2Vnni => unsafe { super::x86_avx2::call_avx2_vnni(body) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => unsafe { super::x86::call_avx512(body) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Level::Avx512Vnni => unsafe { super::x86::call_avx512_vnni(body) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Level::Avx512Dot | Level::Amx => unsafe { super::x86::call_avx512_dot(body) },
        }
    }
}
