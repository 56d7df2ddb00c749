//! A file that takes its name when it is complete.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::gguf::{create_beside, replace};

/// Most symbolic links that are followed, as on Linux.
const MAX_LINKS: usize = 40;

/// A file in the making: it is written under a hidden name beside its place, and what stands in
/// its place stays until [`Output::keep`]. Dropped before, it is removed.
#[derive(Debug)]
pub struct Output {
    /// As the caller spelled it, for sentences.
    asked: PathBuf,
    target: PathBuf,
    temporary: PathBuf,
    kept: bool,
}

impl Output {
    /// Follows symbolic links, refuses what no file may take the place of, and creates the hidden file, empty.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] when something that is no regular file (a device, a pipe, a
    /// folder) has that name, or when its folder does not exist; [`Error::Io`] where nothing can be written there.
    pub fn new(path: &Path) -> Result<Output> {
        let target = resolve(path)?;
        let of_folder = path.as_os_str().as_encoded_bytes().ends_with(b"/");
        if of_folder || target.file_name().is_none() {
            return Err(Error::argument(format_args!(
                "cannot write '{}': it names no file",
                path.display()
            )));
        }
        let folder = match target.parent() {
            Some(folder) if folder != Path::new("") => folder,
            _ => Path::new("."),
        };
        if !folder.is_dir() {
            return Err(Error::argument(format_args!(
                "cannot write '{}': there is no folder '{}'; make it first",
                path.display(),
                folder.display()
            )));
        }
        let created = create_beside(&target);
        let (temporary, _) = created.map_err(|error| renamed(error, path))?;
        Ok(Output {
            asked: path.to_owned(),
            temporary,
            target,
            kept: false,
        })
    }

    /// Fails where the file would take the place of one that is read.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`].
    pub fn differs_from(&self, input: &Path) -> Result<()> {
        let place = |path: &Path| std::fs::canonicalize(path).ok();
        if place(&self.target).is_some_and(|target| place(input) == Some(target)) {
            return Err(Error::argument(format_args!(
                "cannot write '{}': it would take the place of the input; name another file",
                self.asked.display()
            )));
        }
        Ok(())
    }

    /// Fails where the file would take the place of one in a folder that is read, or of what a link there leads to;
    /// but for a GGUF file, which is no part of a checkpoint.
    pub(super) fn differs_from_all_in(&self, folder: &Path) -> Result<()> {
        let by_name = self.asked.extension().is_some_and(|name| name == "gguf");
        if by_name || super::is_gguf(&self.target).unwrap_or(true) {
            return Ok(());
        }
        for entry in std::fs::read_dir(folder).map_err(|e| Error::io(folder, e))? {
            self.differs_from(&entry.map_err(|e| Error::io(folder, e))?.path())?;
        }
        Ok(())
    }

    /// Where to write until the file is complete.
    pub fn temporary(&self) -> &Path {
        &self.temporary
    }

    /// Gives the file its name.
    pub fn keep(mut self) -> Result<()> {
        // Once more, for the work may have taken long.
        let target = resolve(&self.asked)?;
        if target != self.target {
            return Err(Error::argument(format_args!(
                "'{}' leads elsewhere than when its writing began",
                self.asked.display()
            )));
        }
        replace(&self.temporary, &self.target).map_err(|e| Error::io(&self.asked, e))?;
        self.kept = true;
        Ok(())
    }

    /// The error of writing, with the file's own name instead of the temporary one.
    pub fn named(&self, error: Error) -> Error {
        renamed(error, &self.asked)
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        if !self.kept {
            // Nobody is left who could be told.
            let _ = std::fs::remove_file(&self.temporary);
        }
    }
}

fn renamed(error: Error, path: &Path) -> Error {
    match error {
        Error::Io { system, .. } => Error::io(path, system),
        other => other,
    }
}

/// What `path` leads to, which is a regular file or nothing.
fn resolve(path: &Path) -> Result<PathBuf> {
    let refuse = |why: &str| {
        Err(Error::argument(format_args!(
            "cannot write '{}': it is {why}; name a regular file or one that does not exist yet",
            path.display()
        )))
    };
    let mut target = path.to_owned();
    for _ in 0..MAX_LINKS {
        let kind = match std::fs::symlink_metadata(&target) {
            Ok(metadata) => metadata.file_type(),
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(target),
            Err(e) => return Err(Error::io(path, e)),
        };
        if kind.is_file() {
            return Ok(target);
        }
        if kind.is_dir() {
            return refuse("a folder");
        }
        if !kind.is_symlink() {
            return refuse("a device, a pipe or a socket");
        }
        let link = std::fs::read_link(&target).map_err(|e| Error::io(path, e))?;
        // A relative link counts from the folder that it stands in.
        target = target.parent().unwrap_or(Path::new("")).join(link);
    }
    refuse("a circle of symbolic links")
}
