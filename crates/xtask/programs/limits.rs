//! What this machine can do at most: memory reads and multiply-adds, all threads at once. One line of JSON.
//!
//! Each figure is two medians of several rounds, in units of 1e9 a second of the clock and of processor time; what the
//! processor lacks is null. Reads are taken by two loops, since neither is the faster one on every machine: the better median
//! counts.
#![allow(unsafe_code)] // Functions for instruction sets that are looked for at run time, and tiles by inline assembly.

use std::hint::black_box;
use std::time::Instant;

/// More than any cache that a guest can count on; each thread reads its share.
const BYTES: usize = 512 << 20;
const ROUNDS: usize = 7;

fn main() {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    // Written, so that every page is a page of its own and not the one of zeros.
    let words: Vec<u64> = (0..BYTES as u64 / 8).collect();
    let bytes = (words.len() * 8) as f64;
    let share = words.len() / threads;
    let read = |sum: fn(&[u64]) -> u64| {
        let each = |thread: usize| {
            black_box(sum(&words[thread * share..(thread + 1) * share]));
        };
        rate(threads, bytes, each)
    };
    let (one, two) = (read(one_stream), read(two_streams));
    let reads = Rate { clock: one.clock.max(two.clock), processor: one.processor.max(two.processor) };
    let reads = shown(Some(reads));
    let others = multiply_adds(threads).map(|(name, rate)| format!(",\"{name}\":{}", shown(rate)));
    println!("{{\"read\":{reads}{}}}", others.concat());
}

fn shown(rate: Option<Rate>) -> String {
    rate.map_or("null".to_owned(), |Rate { clock, processor }| format!("[{clock:.2},{processor:.2}]"))
}

/// What all threads together do in a second: of the clock, and of processor time, which is what they would do were nothing
/// else to run on their cores.
#[derive(Clone, Copy)]
struct Rate {
    clock: f64,
    processor: f64,
}

/// The medians of rounds in which every thread does `each` once and all of it together is `work`; in 1e9 a second.
fn rate(threads: usize, work: f64, each: impl Fn(usize) + Sync) -> Rate {
    let timed = |thread: usize| {
        let begun = processor_seconds();
        each(thread);
        processor_seconds() - begun
    };
    let round = || {
        let started = Instant::now();
        let used: f64 = std::thread::scope(|scope| {
            let others: Vec<_> = (1..threads).map(|thread| scope.spawn(move || timed(thread))).collect();
            let own = timed(0);
            own + others.into_iter().map(|other| other.join().unwrap_or(f64::NAN)).sum::<f64>()
        });
        [started.elapsed().as_secs_f64(), used / threads as f64].map(|seconds| work / seconds / 1e9)
    };
    round();
    let rounds: Vec<[f64; 2]> = (0..ROUNDS).map(|_| round()).collect();
    let [clock, processor] = [0, 1].map(|which| {
        let mut rates: Vec<f64> = rounds.iter().map(|round| round[which]).collect();
        rates.sort_by(f64::total_cmp);
        rates[ROUNDS / 2]
    });
    Rate { clock, processor }
}

/// Processor time of this thread.
fn processor_seconds() -> f64 {
    #[repr(C)]
    struct Time {
        seconds: i64,
        nanoseconds: i64,
    }
    /// `CLOCK_THREAD_CPUTIME_ID`.
    const THREAD: i32 = 3;
    unsafe extern "C" {
        // SAFETY: writes one `struct timespec`, which is two 64-bit numbers on the platforms that we build for.
        safe fn clock_gettime(clock: i32, time: &mut Time) -> i32;
    }
    let mut time = Time { seconds: 0, nanoseconds: 0 };
    clock_gettime(THREAD, &mut time);
    time.seconds as f64 + time.nanoseconds as f64 / 1e9
}

/// Each thread reads from one place.
fn one_stream(words: &[u64]) -> u64 {
    sum(words, &[])
}

/// Each thread reads from two places in turn.
fn two_streams(words: &[u64]) -> u64 {
    let (first, second) = words.split_at(words.len() / 2);
    sum(first, second)
}

fn sum(first: &[u64], second: &[u64]) -> u64 {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        #[target_feature(enable = "avx2")]
        fn wide(first: &[u64], second: &[u64]) -> u64 {
            plain(first, second)
        }
        // SAFETY: the processor has AVX2.
        return unsafe { wide(first, second) };
    }
    plain(first, second)
}

/// Sums that do not wait for each other; the compiler makes vectors of them.
#[inline(always)]
fn plain(first: &[u64], second: &[u64]) -> u64 {
    const LANES: usize = 32;
    let mut sums = [0_u64; LANES];
    let mut add = |chunk: &[u64; LANES]| {
        for (sum, word) in sums.iter_mut().zip(chunk) {
            *sum = sum.wrapping_add(*word);
        }
    };
    let (first, second) = (first.as_chunks().0, second.as_chunks().0);
    if second.is_empty() {
        first.iter().for_each(add);
    } else {
        for (one, other) in first.iter().zip(second) {
            add(one);
            add(other);
        }
    }
    sums.iter().fold(0, |all, sum| all.wrapping_add(*sum))
}

/// Operations a second by number and instruction: f32, bf16 and bytes; a multiply-add is 2 operations.
fn multiply_adds(threads: usize) -> [(&'static str, Option<Rate>); 8] {
    /// Some tenths of a second a round.
    const TURNS: usize = 10_000_000;
    let portable = rate(threads, (threads * TURNS * 16) as f64, |_| {
        black_box(portable(TURNS));
    });
    #[cfg(target_arch = "x86_64")]
    let [avx2, avx512, avx512_bf16, amx, int8_avx2, int8_vnni, int8_amx] = {
        use x86::{amx, amx_int8, avx2, avx512, avx512_bf16, int8_avx2, int8_vnni};
        let has_avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
        let has_avx512 = is_x86_feature_detected!("avx512f");
        let has_bf16 = has_avx512 && is_x86_feature_detected!("avx512bf16");
        let has_vnni = has_avx512 && is_x86_feature_detected!("avx512vnni");
        // `sums` vectors of `terms` multiply-adds a turn.
        let of = |there: bool, sums: usize, terms: usize, turn: unsafe fn(usize)| {
            there.then(|| {
                // SAFETY: each is called where the processor has what it is for.
                rate(threads, (threads * TURNS * sums * terms * 2) as f64, |_| unsafe { turn(TURNS) })
            })
        };
        let tiles = |turn: unsafe fn(usize), terms: usize| {
            x86::amx_allowed().then(|| {
                const TURNS: usize = 1_000_000;
                // SAFETY: as above, and the kernel lets this process have tiles.
                rate(threads, (threads * TURNS * 4 * 16 * 16 * terms * 2) as f64, |_| unsafe { turn(TURNS) })
            })
        };
        [
            of(has_avx2, 12, 8, avx2),
            of(has_avx512, 24, 16, avx512),
            of(has_bf16, 24, 32, avx512_bf16),
            tiles(amx, 32),
            of(has_avx2, 8, 32, int8_avx2),
            of(has_vnni, 24, 64, int8_vnni),
            tiles(amx_int8, 64),
        ]
    };
    #[cfg(not(target_arch = "x86_64"))]
    let [avx2, avx512, avx512_bf16, amx, int8_avx2, int8_vnni, int8_amx] = [None; 7];
    [
        ("portable", Some(portable)),
        ("avx2", avx2),
        ("avx512", avx512),
        ("avx512_bf16", avx512_bf16),
        ("amx", amx),
        ("int8_avx2", int8_avx2),
        ("int8_vnni", int8_vnni),
        ("int8_amx", int8_amx),
    ]
}

/// 8 sums, each with one addition and one multiplication a turn.
fn portable(turns: usize) -> f32 {
    let mut sums = [1.0_f32; 8];
    let factor = black_box(0.999_f32);
    for _ in 0..turns {
        for sum in &mut sums {
            *sum = *sum * factor + factor;
        }
    }
    sums.iter().sum()
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::asm;
    use std::arch::x86_64::*;
    use std::hint::black_box;

    /// 12 sums of 8 numbers: more than two units of four cycles each can be waiting for.
    #[target_feature(enable = "avx2,fma")]
    pub fn avx2(turns: usize) {
        let factor = _mm256_set1_ps(0.999);
        let mut sums = [_mm256_set1_ps(1.0); 12];
        for _ in 0..turns {
            for sum in &mut sums {
                *sum = _mm256_fmadd_ps(*sum, factor, factor);
            }
        }
        black_box(sums);
    }

    /// 24 sums of 16 numbers.
    #[target_feature(enable = "avx512f")]
    pub fn avx512(turns: usize) {
        let factor = _mm512_set1_ps(0.999);
        let mut sums = [_mm512_set1_ps(1.0); 24];
        for _ in 0..turns {
            for sum in &mut sums {
                *sum = _mm512_fmadd_ps(*sum, factor, factor);
            }
        }
        black_box(sums);
    }

    /// 24 sums of 16 pairs.
    #[target_feature(enable = "avx512f,avx512bf16")]
    pub fn avx512_bf16(turns: usize) {
        // SAFETY: a vector's bits are pairs of any value; these are of 1.0.
        let pairs: __m512bh = unsafe { std::mem::transmute(_mm512_set1_epi32(0x3f80_3f80)) };
        let mut sums = [_mm512_set1_ps(1.0); 24];
        for _ in 0..turns {
            for sum in &mut sums {
                *sum = _mm512_dpbf16_ps(*sum, pairs, pairs);
            }
        }
        black_box(sums);
    }

    /// 8 sums of 32 bytes: products of two, their sums, and those added.
    #[target_feature(enable = "avx2")]
    pub fn int8_avx2(turns: usize) {
        let (ones, plain) = (_mm256_set1_epi16(1), _mm256_set1_epi8(1));
        let mut bytes = [plain; 8];
        let mut sums = [_mm256_setzero_si256(); 8];
        for _ in 0..turns {
            // Not known to the compiler, so that it takes no product out of the loop.
            black_box(&mut bytes);
            for (sum, bytes) in sums.iter_mut().zip(bytes) {
                let twos = _mm256_maddubs_epi16(plain, bytes);
                *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(twos, ones));
            }
        }
        black_box(sums);
    }

    /// 24 sums of 64 bytes.
    #[target_feature(enable = "avx512f,avx512vnni")]
    pub fn int8_vnni(turns: usize) {
        let bytes = _mm512_set1_epi8(1);
        let mut sums = [_mm512_set1_epi32(1); 24];
        for _ in 0..turns {
            for sum in &mut sums {
                *sum = _mm512_dpbusd_epi32(*sum, bytes, bytes);
            }
        }
        black_box(sums);
    }

    /// Whether the processor has bf16 tiles and the kernel lets this process use them.
    pub fn amx_allowed() -> bool {
        const TILES: u32 = 1 << 24;
        const BF16: u32 = 1 << 22;
        /// `arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)`.
        const SYSCALL: i64 = 158;
        let has = __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx & (TILES | BF16) == (TILES | BF16);
        has && {
            let mut result = SYSCALL;
            // SAFETY: a system call that touches no memory of ours; it clobbers rcx and r11.
            unsafe {
                asm!("syscall", inlateout("rax") result, in("rdi") 0x1023, in("rsi") 18,
                    lateout("rcx") _, lateout("r11") _, options(nostack));
            }
            result == 0
        }
    }

    /// 8 tiles of 16 rows of 64 bytes.
    #[repr(C, align(64))]
    struct Shape([u8; 64]);

    /// 4 products of 16 x 32 and 32 x 16 bf16 numbers a turn, each into a tile of its own.
    ///
    /// # Safety
    /// [`amx_allowed`] said yes.
    pub unsafe fn amx(turns: usize) {
        // SAFETY: the caller's.
        unsafe {
            with_tiles(turns, || {
                asm!(
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tdpbf16ps tmm3, tmm5, tmm7"
                )
            });
        }
    }

    /// 4 products of 16 x 64 and 64 x 16 bytes a turn.
    ///
    /// # Safety
    /// As [`amx`].
    pub unsafe fn amx_int8(turns: usize) {
        // SAFETY: the caller's.
        unsafe {
            with_tiles(turns, || {
                asm!(
                    "tdpbusd tmm0, tmm4, tmm6",
                    "tdpbusd tmm1, tmm4, tmm7",
                    "tdpbusd tmm2, tmm5, tmm6",
                    "tdpbusd tmm3, tmm5, tmm7"
                )
            });
        }
    }

    /// # Safety
    /// As [`amx`]; a turn uses the tiles alone.
    #[inline(always)]
    unsafe fn with_tiles(turns: usize, turn: impl Fn()) {
        let mut shape = Shape([0; 64]);
        shape.0[0] = 1;
        for tile in 0..8 {
            shape.0[16 + 2 * tile] = 64;
            shape.0[48 + tile] = 16;
        }
        // SAFETY: tiles are zero after the configuration, and released before other code runs on this thread.
        unsafe {
            asm!("ldtilecfg [{}]", in(reg) &raw const shape);
            (0..turns).for_each(|_| turn());
            asm!("tilerelease");
        }
    }
}
