//! The words of the matrix unit of x86-64 (AMX): tiles of 16 rows of 64 bytes. Nothing but the mapping and
//! whether this machine has it; their twin is `Twin` in matrix_unit.rs.

use super::matrix_unit::{CODES_TILE_BYTES, Pairs, TILE, Unit};
use crate::dtype::Arithmetic;
use std::arch::asm;
use std::sync::OnceLock;

/// The unit. Used only under an `Isa` that detected it.
#[derive(Clone, Copy)]
pub(super) struct Amx;

/// `arch_prctl`: leave to use a part of the registers' state, and the part that tiles are.
const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
const XFEATURE_XTILEDATA: libc::c_long = 18;
/// Of CPUID 7.0's EDX: products of bf16, tiles, products of bytes.
const NEEDED: u32 = 1 << 22 | 1 << 24 | 1 << 25;

/// The processor has tiles with both kinds of products, and the kernel lets this process use them.
pub(super) fn granted() -> bool {
    static GRANTED: OnceLock<bool> = OnceLock::new();
    *GRANTED.get_or_init(|| {
        use std::arch::x86_64::{__cpuid, __cpuid_count};
        let has = __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx & NEEDED == NEEDED;
        // SAFETY: two numbers to a system call that touches no memory.
        has && unsafe {
            libc::syscall(
                libc::SYS_arch_prctl,
                ARCH_REQ_XCOMP_PERM,
                XFEATURE_XTILEDATA,
            ) == 0
        }
    })
}

/// `LDTILECFG`'s argument: palette 1, eight tiles of rows of 64 bytes.
#[repr(C, align(64))]
struct Shapes([u8; 64]);

impl Shapes {
    /// Sums and x, tiles 0 to 4, have so many rows, the others 16: a product takes as long as x has rows.
    const fn of(rows: usize) -> Shapes {
        let mut bytes = [0; 64];
        bytes[0] = 1;
        let mut tile = 0;
        while tile < 8 {
            bytes[16 + 2 * tile] = 64;
            bytes[48 + tile] = if tile < 5 { rows as u8 } else { 16 };
            tile += 1;
        }
        Shapes(bytes)
    }
}

/// 32 rows × 32 columns: tiles 0 to 3 are sums, 4 and 5 rows of x, 6 and 7 weights.
#[inline(always)]
unsafe fn two_by_two(job: Pairs) {
    let x = job.x.cast::<u8>();
    let (weights, out) = (job.weights.cast::<u8>(), job.out.cast::<u8>());
    // SAFETY: the addresses are the job's, by the caller; no register but the tiles and those named changes,
    // and the compiler knows nothing of tiles.
    unsafe {
        asm!(
            "test {fresh}, {fresh}",
            "jnz 3f",
            "tileloadd tmm0, [{c0} + {ldc}]",
            "tileloadd tmm1, [{c0} + {ldc} + 64]",
            "tileloadd tmm2, [{c1} + {ldc}]",
            "tileloadd tmm3, [{c1} + {ldc} + 64]",
            "jmp 2f",
            "3:",
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "2:",
            "tileloadd tmm4, [{a0} + {lda}]",
            "tileloadd tmm6, [{b0} + {ldb}]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{b1} + {ldb}]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tileloadd tmm5, [{a1} + {lda}]",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "add {a0}, 64",
            "add {a1}, 64",
            "add {b0}, 1024",
            "add {b1}, 1024",
            "dec {steps}",
            "jnz 2b",
            "tilestored [{c0} + {ldc}], tmm0",
            "tilestored [{c0} + {ldc} + 64], tmm1",
            "tilestored [{c1} + {ldc}], tmm2",
            "tilestored [{c1} + {ldc} + 64], tmm3",
            fresh = in(reg) job.fresh as usize,
            steps = inout(reg) job.steps => _,
            a0 = inout(reg) x => _,
            a1 = inout(reg) x.wrapping_add(64 * job.x_stride) => _,
            lda = in(reg) 4 * job.x_stride,
            b0 = inout(reg) weights => _,
            b1 = inout(reg) weights.wrapping_add(1024 * job.steps) => _,
            ldb = in(reg) 64usize,
            c0 = in(reg) out,
            c1 = in(reg) out.wrapping_add(64 * job.out_stride),
            ldc = in(reg) 4 * job.out_stride,
            options(nostack),
        );
    }
}

/// 16 rows × 64 columns: tiles 0 to 3 are sums, 4 rows of x, 5 to 7 weights.
#[inline(always)]
unsafe fn one_by_four(job: Pairs) {
    let (weights, block) = (job.weights.cast::<u8>(), 1024 * job.steps);
    // SAFETY: as above.
    unsafe {
        asm!(
            "test {fresh}, {fresh}",
            "jnz 3f",
            "tileloadd tmm0, [{c} + {ldc}]",
            "tileloadd tmm1, [{c} + {ldc} + 64]",
            "tileloadd tmm2, [{c} + {ldc} + 128]",
            "tileloadd tmm3, [{c} + {ldc} + 192]",
            "jmp 2f",
            "3:",
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "2:",
            "tileloadd tmm4, [{a} + {lda}]",
            "tileloadd tmm5, [{b0} + {ldb}]",
            "tdpbf16ps tmm0, tmm4, tmm5",
            "tileloadd tmm6, [{b1} + {ldb}]",
            "tdpbf16ps tmm1, tmm4, tmm6",
            "tileloadd tmm7, [{b2} + {ldb}]",
            "tdpbf16ps tmm2, tmm4, tmm7",
            "tileloadd tmm5, [{b3} + {ldb}]",
            "tdpbf16ps tmm3, tmm4, tmm5",
            "add {a}, 64",
            "add {b0}, 1024",
            "add {b1}, 1024",
            "add {b2}, 1024",
            "add {b3}, 1024",
            "dec {steps}",
            "jnz 2b",
            "tilestored [{c} + {ldc}], tmm0",
            "tilestored [{c} + {ldc} + 64], tmm1",
            "tilestored [{c} + {ldc} + 128], tmm2",
            "tilestored [{c} + {ldc} + 192], tmm3",
            fresh = in(reg) job.fresh as usize,
            steps = inout(reg) job.steps => _,
            a = inout(reg) job.x => _,
            lda = in(reg) 4 * job.x_stride,
            b0 = inout(reg) weights => _,
            b1 = inout(reg) weights.wrapping_add(block) => _,
            b2 = inout(reg) weights.wrapping_add(2 * block) => _,
            b3 = inout(reg) weights.wrapping_add(3 * block) => _,
            ldb = in(reg) 64usize,
            c = in(reg) job.out,
            ldc = in(reg) 4 * job.out_stride,
            options(nostack),
        );
    }
}

impl Unit for Amx {
    #[inline(always)]
    fn open(rows: usize) {
        let shapes = Shapes::of(rows.clamp(1, TILE));
        // SAFETY: the unit was detected and granted before this type was used; the shapes are legal.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &shapes, options(nostack, readonly)) };
    }

    #[inline(always)]
    fn close() {
        // SAFETY: as above.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }

    #[inline(always)]
    unsafe fn two_by_two(job: Pairs) {
        // SAFETY: the caller's.
        unsafe { two_by_two(job) }
    }

    #[inline(always)]
    unsafe fn one_by_four(job: Pairs) {
        // SAFETY: the caller's.
        unsafe { one_by_four(job) }
    }

    #[inline(always)]
    unsafe fn four_codes((x, stride): (*const i8, usize), codes: *const u8, ints: *mut u32) {
        // SAFETY: the addresses are the caller's; the rest as above.
        unsafe {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "tileloadd tmm4, [{x} + {stride}]",
                "tileloadd tmm5, [{codes} + {line}]",
                "tdpbsud tmm0, tmm4, tmm5",
                "tileloadd tmm6, [{x} + {stride} + 64]",
                "tileloadd tmm7, [{codes} + {line} + 1024]",
                "tdpbsud tmm1, tmm6, tmm7",
                "tileloadd tmm4, [{x} + {stride} + 128]",
                "tileloadd tmm5, [{codes} + {line} + 2048]",
                "tdpbsud tmm2, tmm4, tmm5",
                "tileloadd tmm6, [{x} + {stride} + 192]",
                "tileloadd tmm7, [{codes} + {line} + 3072]",
                "tdpbsud tmm3, tmm6, tmm7",
                "tilestored [{ints} + {line}], tmm0",
                "tilestored [{ints} + {line} + 1024], tmm1",
                "tilestored [{ints} + {line} + 2048], tmm2",
                "tilestored [{ints} + {line} + 3072], tmm3",
                x = in(reg) x,
                stride = in(reg) stride,
                codes = in(reg) codes,
                ints = in(reg) ints,
                line = in(reg) 64usize,
                options(nostack),
            );
        }
    }

    #[inline(always)]
    unsafe fn codes((x, stride): (*const i8, usize), codes: *const u8, ints: *mut u32) {
        const { assert!(CODES_TILE_BYTES == 1024) };
        // SAFETY: the addresses are the caller's; the rest as above.
        unsafe {
            asm!(
                "tilezero tmm0",
                "tileloadd tmm4, [{x} + {stride}]",
                "tileloadd tmm5, [{codes} + {line}]",
                "tdpbsud tmm0, tmm4, tmm5",
                "tilestored [{ints} + {line}], tmm0",
                x = in(reg) x,
                stride = in(reg) stride,
                codes = in(reg) codes,
                ints = in(reg) ints,
                line = in(reg) 64usize,
                options(nostack),
            );
        }
    }

    fn peak(arithmetic: Arithmetic, steps: usize) -> Option<u64> {
        Self::open(TILE);
        // SAFETY: tiles only; all are zero after `open`.
        unsafe {
            match arithmetic {
                Arithmetic::Int8 => asm!(
                    "2:",
                    "tdpbsud tmm0, tmm4, tmm6",
                    "tdpbsud tmm1, tmm4, tmm7",
                    "tdpbsud tmm2, tmm5, tmm6",
                    "tdpbsud tmm3, tmm5, tmm7",
                    "dec {steps}",
                    "jnz 2b",
                    steps = inout(reg) steps.max(1) => _,
                    options(nostack, nomem),
                ),
                _ => asm!(
                    "2:",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    "dec {steps}",
                    "jnz 2b",
                    steps = inout(reg) steps.max(1) => _,
                    options(nostack, nomem),
                ),
            }
        }
        Self::close();
        let products = if arithmetic == Arithmetic::Int8 {
            64
        } else {
            32
        };
        Some((4 * 2 * 16 * 16 * products * steps.max(1)) as u64)
    }
}
