//! The CPU: buffers in memory, operations done at once by a few threads.
//!
//! **Invariant.** Threads split rows, columns or heads, never a sum; every sum runs in an order that depends on
//! its length and the kernel level only. So results do not depend on threads, on what else is in a batch, or on
//! how a step is cut.
#![allow(unsafe_code)] // Owns raw memory that threads share; kernels get it as `Cells`.

mod attention;
mod cells;
mod dynamic;
mod embed;
mod exec;
mod gemm;
mod glu;
mod loss;
mod norm;
mod optimizer;
mod pointwise;
mod pool;
mod simd;

use std::cell::RefCell;

#[cfg(target_os = "linux")]
use memmap2::Advice;
use memmap2::{MmapMut, MmapRaw};

use super::{Buf, Data, DataMut, Device, Element, Op};
use crate::files::Mapped;
use crate::{Error, Result};
use cells::Cells;
use gemm::{Matrix, Quantized};
use lathe_plan::PRODUCT_PANEL;
use pool::Pool;

/// Which instructions the kernels use. A level is part of a result's identity: bits are equal within a level.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// [`Level::Amx`] with its tiles emulated one by one, any machine: slow, to test its kernels.
    AmxEmulated,
    /// Plain Rust, any machine.
    Portable,
    /// 8-wide AVX2 with fused multiply-add.
    Avx2,
    /// 16-wide AVX-512 (F, BW, DQ, VL).
    Avx512,
    /// AVX-512 with products of pairs of bf16 numbers: what meets a bf16 weight is rounded to bf16.
    Avx512Bf16,
    /// The same numbers in tiles of AMX (and Int8, Int4), sums in the order of tiles.
    Amx,
}

impl Level {
    /// All of them, the slowest first.
    pub const ALL: [Level; 6] =
        [Level::AmxEmulated, Level::Portable, Level::Avx2, Level::Avx512, Level::Avx512Bf16, Level::Amx];

    /// The best that this machine has, or the one that the environment variable `LATHE_CPU` names.
    ///
    /// # Errors
    /// [`Error::CpuLevel`] where it names none, or one that this machine lacks.
    pub fn detect() -> Result<Level> {
        let asked = std::env::var_os("LATHE_CPU").unwrap_or_default();
        Level::choose(&asked.to_string_lossy(), Level::best())
    }

    /// The level of this name, of a machine that has all up to `best`; `best` where the name is empty.
    fn choose(asked: &str, best: Level) -> Result<Level> {
        if asked.is_empty() {
            return Ok(best);
        }
        let here = || Level::up_to(best);
        here().find(|level| level.name() == asked).ok_or_else(|| {
            let names = |levels: &mut dyn Iterator<Item = Level>| {
                levels.map(Level::name).collect::<Vec<_>>().join(", ")
            };
            Error::CpuLevel {
                asked: asked.chars().take(40).flat_map(char::escape_debug).collect(),
                all: names(&mut Level::ALL.into_iter()),
                here: names(&mut here()),
            }
        })
    }

    /// Those that this machine has, the slowest first.
    pub fn here() -> impl Iterator<Item = Level> {
        Level::up_to(Level::best())
    }

    fn up_to(best: Level) -> impl Iterator<Item = Level> {
        Level::ALL.into_iter().filter(move |level| *level <= best)
    }

    fn best() -> Level {
        #[cfg(target_arch = "x86_64")]
        {
            macro_rules! has {
                ($($feature:tt),*) => { $(std::arch::is_x86_feature_detected!($feature))&&* };
            }
            if has!("avx2", "fma") {
                return match has!("avx512f", "avx512bw", "avx512dq", "avx512vl") {
                    false => Level::Avx2,
                    true if has!("avx512bf16") && simd::tiles_available() => Level::Amx,
                    true if has!("avx512bf16") => Level::Avx512Bf16,
                    true => Level::Avx512,
                };
            }
        }
        Level::Portable
    }

    /// Whether products with a bf16 weight of this many inputs are products of pairs.
    fn takes_pairs(self, inputs: usize) -> bool {
        self.rounds_to_bf16() && inputs.is_multiple_of(2)
    }

    /// Whether what is multiplied with a bf16 weight (of an even number of inputs) is rounded to bf16.
    pub fn rounds_to_bf16(self) -> bool {
        self == Level::Avx512Bf16 || self.has_tiles()
    }

    fn has_tiles(self) -> bool {
        matches!(self, Level::Amx | Level::AmxEmulated)
    }

    /// The name, as `LATHE_CPU` takes it.
    pub fn name(self) -> &'static str {
        match self {
            Level::AmxEmulated => "amx_emulated",
            Level::Portable => "portable",
            Level::Avx2 => "avx2",
            Level::Avx512 => "avx512",
            Level::Avx512Bf16 => "avx512_bf16",
            Level::Amx => "amx",
        }
    }
}

/// A buffer's memory.
enum Storage {
    /// Pages of its own, which the kernel gives as they are touched.
    Own(MmapRaw),
    /// Part of a file, aligned to its elements.
    File(Mapped),
}

impl Storage {
    fn start(&self) -> *mut u8 {
        match self {
            Storage::Own(pages) => pages.as_mut_ptr(),
            Storage::File(bytes) => bytes.start(),
        }
    }

    fn len(&self) -> usize {
        match self {
            Storage::Own(pages) => pages.len(),
            Storage::File(bytes) => bytes.len(),
        }
    }
}

/// The CPU as a device.
pub struct Cpu {
    buffers: Vec<Option<Storage>>,
    /// Borrowed for the time of one operation.
    pool: RefCell<Pool>,
    threads: usize,
    level: Level,
    scratch: Option<Buf>,
}

impl Cpu {
    /// A device of `threads` threads. A level that the machine does not have is lowered to what it has.
    pub fn new(threads: usize, level: Level) -> Cpu {
        let threads = threads.clamp(1, 4096);
        Cpu {
            buffers: Vec::new(),
            pool: RefCell::new(Pool::new(threads)),
            threads,
            level: level.min(Level::best()),
            scratch: None,
        }
    }

    fn keep(&mut self, storage: Storage, element: Element, len: usize) -> Buf {
        let id = match self.buffers.iter().position(Option::is_none) {
            Some(free) => {
                self.buffers[free] = Some(storage);
                free
            }
            None => {
                self.buffers.push(Some(storage));
                self.buffers.len() - 1
            }
        };
        Buf::whole(id as u32, element, len)
    }

    fn pool_threads(&self) -> usize {
        self.threads
    }

    /// The elements of a range; a mistake in a handle is a mistake of the engine and panics.
    fn cells<T>(&self, buf: Buf, element: Element) -> Cells<T> {
        assert_eq!(buf.element(), element, "an operation takes {element:?}");
        assert_eq!(size_of::<T>(), element.bytes());
        let storage = self.buffers[buf.id()].as_ref();
        let Some(storage) = storage else { panic!("{buf:?} was freed") };
        assert!((buf.start() + buf.len()) * size_of::<T>() <= storage.len());
        // SAFETY: the range is inside the storage, which outlives the operation (`&self`).
        unsafe { Cells::new(storage.start().cast::<T>().add(buf.start()), buf.len()) }
    }

    fn f32(&self, buf: Buf) -> Cells<f32> {
        self.cells(buf, Element::F32)
    }

    fn u32(&self, buf: Buf) -> Cells<u32> {
        self.cells(buf, Element::U32)
    }

    fn f64(&self, buf: Buf) -> Cells<f64> {
        self.cells(buf, Element::F64)
    }

    fn matrix(&self, buf: Buf, outputs: usize, inputs: usize) -> Matrix {
        match buf.element() {
            Element::Int8 | Element::Int4 => Matrix::Int(Quantized::of(self, buf, outputs, inputs)),
            Element::BF16 => Matrix::BF16(self.cells(buf, Element::BF16)),
            _ => Matrix::F32(self.f32(buf)),
        }
    }

    /// Scratch: first that of all threads, each its own, then what they share in an operation, [`PRODUCT_PANEL`] elements.
    fn scratch(&self) -> [Cells<f32>; 2] {
        // Loading needs none.
        // SAFETY: nothing is read or written through an empty range.
        let none = || unsafe { Cells::new(std::ptr::NonNull::dangling().as_ptr(), 0) };
        let all = self.scratch.map_or_else(none, |scratch| self.f32(scratch));
        let own = all.len().saturating_sub(PRODUCT_PANEL);
        [all.part(0..own), all.part(own..all.len())]
    }

    /// The scratch that threads share.
    fn panel(&self) -> Cells<f32> {
        let [_, panel] = self.scratch();
        panel
    }

    /// Calls `task(level, number, scratch)` for each number below `tasks`, on all threads.
    fn run(&self, tasks: usize, task: impl Fn(Level, usize, Cells<f32>) + Sync) {
        let [scratch, _] = self.scratch();
        let each = scratch.len() / self.threads;
        let level = self.level;
        self.pool.borrow_mut().run(tasks, &|number, thread| {
            task(level, number, scratch.part(thread * each..(thread + 1) * each));
        });
    }

    /// Calls `task(level, range, scratch)` for ranges that cover `0..count`, each about `grain` long.
    fn run_ranges(
        &self,
        count: usize,
        grain: usize,
        task: impl Fn(Level, std::ops::Range<usize>, Cells<f32>) + Sync,
    ) {
        let grain = grain.max(1);
        self.run(count.div_ceil(grain), |level, number, scratch| {
            task(level, number * grain..((number + 1) * grain).min(count), scratch);
        });
    }
}

impl Device for Cpu {
    fn alloc(&mut self, name: &str, element: Element, len: usize) -> Result<Buf> {
        let bytes = len as u64 * element.bytes() as u64;
        let refused = || Error::OutOfMemory { name: name.to_owned(), bytes };
        let size = usize::try_from(bytes.max(1)).map_err(|_| refused())?;
        let pages = MmapRaw::from(MmapMut::map_anon(size).map_err(|_| refused())?);
        // Only advice. Processors read ahead within a page alone, and huge ones need no look at page tables.
        #[cfg(target_os = "linux")]
        let _ = pages.advise(Advice::HugePage);
        Ok(self.keep(Storage::Own(pages), element, len))
    }

    fn adopt(&mut self, element: Element, bytes: &Mapped) -> Option<Buf> {
        let len = bytes.len() / element.bytes();
        let usable = cfg!(target_endian = "little")
            && bytes.start().addr().is_multiple_of(element.bytes())
            && len * element.bytes() == bytes.len();
        usable.then(|| {
            bytes.read_ahead();
            self.keep(Storage::File(bytes.clone()), element, len)
        })
    }

    fn free(&mut self, buf: Buf) {
        self.buffers[buf.id()] = None;
        if self.scratch.is_some_and(|s| s.id() == buf.id()) {
            self.scratch = None;
        }
    }

    fn set_scratch(&mut self, scratch: Buf) {
        self.scratch = Some(scratch);
    }

    fn write(&mut self, to: Buf, data: Data<'_>) {
        fn copy<T: Copy>(to: Cells<T>, from: &[T]) {
            // SAFETY: operations run at once, so nobody else uses the buffer now.
            unsafe { to.part(0..from.len()).write().copy_from_slice(from) };
        }
        match data {
            Data::F32(from) => copy(self.f32(to), from),
            Data::BF16(from) => copy(self.cells(to, Element::BF16), from),
            Data::U32(from) => copy(self.u32(to), from),
            Data::U64(from) => copy(self.cells(to, Element::U64), from),
            Data::U8(from) => copy(self.cells(to, Element::U8), from),
        }
    }

    fn enqueue(&mut self, op: Op) {
        exec::run(self, op);
    }

    fn read(&mut self, from: Buf, into: DataMut<'_>) {
        fn copy<T: Copy>(from: Cells<T>, into: &mut [T]) {
            // SAFETY: operations run at once, so nobody writes the buffer now.
            into.copy_from_slice(unsafe { from.part(0..into.len()).read() });
        }
        match into {
            DataMut::F32(into) => copy(self.f32(from), into),
            DataMut::BF16(into) => copy(self.cells(from, Element::BF16), into),
            DataMut::F64(into) => copy(self.f64(from), into),
            DataMut::U8(into) => copy(self.cells(from, Element::U8), into),
        }
    }

    fn level(&self) -> Level {
        self.level
    }

    fn threads(&self) -> usize {
        self.threads
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    #[rstest]
    #[case::nothing("", Level::Avx2, Some(Level::Avx2))]
    #[case::less("portable", Level::Avx2, Some(Level::Portable))]
    #[case::the_best("avx512", Level::Avx512, Some(Level::Avx512))]
    #[case::more_than_there_is("avx512", Level::Avx2, None)]
    #[case::unknown("sse", Level::Avx2, None)]
    #[case::another_case("AVX2", Level::Avx2, None)]
    fn a_level_is_asked_for_by_name(#[case] asked: &str, #[case] best: Level, #[case] chosen: Option<Level>) {
        let found = Level::choose(asked, best);
        if let Err(error) = &found {
            let text = format!(
                "must be one of amx_emulated, portable, avx2, avx512, avx512_bf16, amx, of which this machine has \
                 amx_emulated, portable, avx2 (found `{asked}`)"
            );
            assert!(error.to_string().contains(&text), "{error}");
        }
        assert_eq!(found.ok(), chosen);
    }
}
