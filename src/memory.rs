//! Memory that may be refused. Rust's containers end the process when the system gives no memory;
//! a library inside somebody's program must return an error instead. All that is taken between the
//! opening of a model and the end of a session goes through here or through `try_reserve`.

use crate::error::{Error, Result};
use std::alloc::{Layout, alloc, dealloc};
use std::ops::Deref;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering, fence};

/// An empty vector with room for `count` elements.
pub(crate) fn reserved<T>(count: usize) -> Result<Vec<T>> {
    let mut vector = Vec::new();
    vector
        .try_reserve_exact(count)
        .map_err(|_| Error::OutOfMemory {
            bytes: count.saturating_mul(size_of::<T>()),
        })?;
    Ok(vector)
}

/// Appends with [`Vec::try_reserve`].
pub(crate) fn try_push<T>(vector: &mut Vec<T>, item: T) -> Result<()> {
    vector.try_reserve(1).map_err(|_| Error::OutOfMemory {
        bytes: vector.len().saturating_mul(2 * size_of::<T>()),
    })?;
    vector.push(item);
    Ok(())
}

/// Collects with [`try_push`].
pub(crate) fn try_collect<T>(items: impl IntoIterator<Item = Result<T>>) -> Result<Vec<T>> {
    let items = items.into_iter();
    let mut vector = reserved(items.size_hint().0)?;
    for item in items {
        try_push(&mut vector, item?)?;
    }
    Ok(vector)
}

/// An empty text with room for `bytes` bytes.
pub(crate) fn reserved_string(bytes: usize) -> Result<String> {
    let mut text = String::new();
    text.try_reserve_exact(bytes)
        .map_err(|_| Error::OutOfMemory { bytes })?;
    Ok(text)
}

/// An owned copy of a text.
pub(crate) fn try_string(text: &str) -> Result<String> {
    let mut owned = reserved_string(text.len())?;
    owned.push_str(text);
    Ok(owned)
}

/// A value that several owners share, as in [`std::sync::Arc`], whose making can fail.
pub(crate) struct Shared<T> {
    inner: NonNull<Counted<T>>,
}

struct Counted<T> {
    owners: AtomicUsize,
    value: T,
}

// SAFETY: an owner gives out `&T` on its thread and may be the one that drops the `T`, so `T` must
// be both; the count is atomic.
unsafe impl<T: Send + Sync> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Send + Sync> Sync for Shared<T> {}

impl<T> Shared<T> {
    pub fn new(value: T) -> Result<Self> {
        let layout = Layout::new::<Counted<T>>();
        // SAFETY: the size is not zero, for the count is part of it.
        let memory = unsafe { alloc(layout) }.cast::<Counted<T>>();
        let inner = NonNull::new(memory).ok_or(Error::OutOfMemory {
            bytes: layout.size(),
        })?;
        let owners = AtomicUsize::new(1);
        // SAFETY: fresh memory of this layout.
        unsafe { inner.write(Counted { owners, value }) };
        Ok(Shared { inner })
    }

    fn counted(&self) -> &Counted<T> {
        // SAFETY: `self` is one of the owners, so the value is alive; it is never changed but by
        // the last owner's drop.
        unsafe { self.inner.as_ref() }
    }
}

impl<T> Deref for Shared<T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.counted().value
    }
}

impl<T> Clone for Shared<T> {
    fn clone(&self) -> Self {
        // Relaxed, as in Arc: a new owner comes from an existing one. The count cannot overflow,
        // since each owner takes at least a pointer's room in memory.
        self.counted().owners.fetch_add(1, Ordering::Relaxed);
        Shared { inner: self.inner }
    }
}

impl<T> Drop for Shared<T> {
    fn drop(&mut self) {
        if self.counted().owners.fetch_sub(1, Ordering::Release) != 1 {
            return;
        }
        // What other owners did before they left happens before the value is dropped.
        fence(Ordering::Acquire);
        // SAFETY: this was the last owner; the memory came from `alloc` with this layout.
        unsafe {
            self.inner.drop_in_place();
            dealloc(self.inner.as_ptr().cast(), Layout::new::<Counted<T>>());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn the_last_owner_drops_the_value() {
        let value = Arc::new(7);
        let shared = Shared::new(Arc::clone(&value)).unwrap();
        let threads: Vec<_> = (0..4)
            .map(|_| {
                let shared = shared.clone();
                std::thread::spawn(move || {
                    for _ in 0..1000 {
                        assert_eq!(**shared.clone(), 7);
                    }
                })
            })
            .collect();
        threads.into_iter().for_each(|t| t.join().unwrap());
        assert_eq!(Arc::strong_count(&value), 2);
        drop(shared);
        assert_eq!(Arc::strong_count(&value), 1);
    }
}
