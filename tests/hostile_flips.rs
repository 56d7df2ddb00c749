//! Random bytes flipped in model files: an answer or an error, no panic, and no memory beyond what
//! the file's size explains.
#![cfg(feature = "convert")]

mod common;
#[path = "hostile/support.rs"]
mod support;

use common::Random;
use common::cases::gguf_bytes;
use mor::Model;
use mor::gguf::Gguf;
use mor::quant::TensorType;
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Remembers the largest piece of memory that was asked for.
struct Watching;

static LARGEST: AtomicUsize = AtomicUsize::new(0);

// SAFETY: everything is handed to the system's allocator as it came.
unsafe impl GlobalAlloc for Watching {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LARGEST.fetch_max(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's duties are passed on.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(ptr, layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        LARGEST.fetch_max(layout.size(), Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        LARGEST.fetch_max(size, Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.realloc(ptr, layout, size) }
    }
}

#[global_allocator]
static WATCHING: Watching = Watching;

const FLIPPED_FILES: usize = 400;

/// Far above any session of these models at 16 tokens, far below a nuisance.
const MOST_BYTES: usize = 64 << 20;

#[test]
fn flipped_bytes_end_in_an_answer_or_an_error() {
    let mut random = Random(0x6d6f72);
    let (mut opened, mut ran, mut total) = (0, 0, 0);
    for (kind, ty) in [
        ("vanilla", TensorType::F32),
        ("recursive_sequence", TensorType::Q8_0),
        ("expert_middle_cycle", TensorType::F16),
        ("expert_kv_shared", TensorType::Q4_0),
        ("expert_aux_router", TensorType::BF16),
        ("expert_own_norms", TensorType::Q4_1),
        ("token_loss_free", TensorType::F32),
        ("token_kv_shared", TensorType::Q8_0),
    ] {
        let bytes = gguf_bytes(kind, ty);
        let gguf = Gguf::parse(&bytes).unwrap();
        let head = gguf.tensors().iter().map(|t| t.offset).min().unwrap();
        for _ in 0..FLIPPED_FILES {
            let mut bytes = bytes.clone();
            // Most of a file is weights; what steers the reader is in its head.
            let span = [head, head, bytes.len()][random.below(3)];
            for _ in 0..=random.below(4) {
                bytes[random.below(span)] ^= 1 << random.below(8);
            }
            total += 1;
            LARGEST.store(0, Ordering::Relaxed);
            opened += usize::from(Model::from_bytes(bytes.clone()).is_ok());
            let result = support::run(bytes, &[1, 2, 3, 0]);
            let largest = LARGEST.load(Ordering::Relaxed);
            assert!(largest < MOST_BYTES, "{kind}: {largest} bytes at once");
            match result {
                Ok(()) => ran += 1,
                Err(error) => assert!(!error.to_string().is_empty()),
            }
        }
    }
    println!("{total} files: {opened} opened, {ran} ran");
    assert!(opened > 100 && opened < total && ran > 100);
}
