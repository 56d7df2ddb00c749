//! What Java's environment offers, as far as it is needed, with Rust's errors.

use crate::error::Error;
use crate::ffi::*;
use crate::memory::reserved;
use crate::text::Text;
use jni_sys::*;
use std::ffi::{CStr, c_char, c_void};

/// Why a native method has no result.
#[allow(clippy::large_enum_variant)] // the sentence is kept in place, as everywhere
pub(super) enum Failure {
    /// Java has an exception already: of a callback, or because it has no memory.
    Thrown,
    /// The exception that is to be thrown.
    Status(mor_status, Text),
}

pub(super) type Result<T> = std::result::Result<T, Failure>;

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure::Status((&error).into(), Text::new(error))
    }
}

impl Failure {
    pub fn argument(what: impl std::fmt::Display) -> Self {
        Error::argument(what).into()
    }

    /// A status with the sentence at a pointer of C's, or its own where there is none.
    pub unsafe fn status(status: mor_status, text: *const c_char) -> Self {
        // SAFETY: passed on; the library's texts end with a zero byte.
        let text = match unsafe { CStr::from_ptr(text) } {
            empty if empty.is_empty() => unsafe { CStr::from_ptr(mor_status_text(status as i32)) },
            text => text,
        };
        Failure::Status(status, Text::new(text.to_string_lossy()))
    }
}

/// What a method answers when it throws; Java does not look at it.
pub(super) trait Answer {
    const NONE: Self;
}
impl Answer for () {
    const NONE: Self = ();
}
impl Answer for jint {
    const NONE: Self = 0;
}
impl Answer for jlong {
    const NONE: Self = 0;
}
impl Answer for jboolean {
    const NONE: Self = false;
}
impl Answer for jobject {
    const NONE: Self = std::ptr::null_mut();
}

/// Defines native methods: `jni` names the environment, the block is a [`Result`] of the answer. All of
/// them go through [`run`], so that no panic passes and every failure becomes an exception.
macro_rules! native {
    ($(fn $name:ident($jni:ident $(, $arg:ident: $type:ty)*) $(-> $answer:ty)? $body:block)*) => {$(
        #[unsafe(no_mangle)]
        #[allow(non_snake_case)] // the name is JNI's
        unsafe extern "system" fn $name(
            env: *mut jni_sys::JNIEnv,
            class: jni_sys::jclass
            $(, $arg: $type)*
        ) $(-> $answer)? {
            // SAFETY: Java passes its environment; the rest is what `mod.rs` says.
            unsafe { $crate::jni::env::run(env, class, |$jni: &$crate::jni::env::Env| $body) }
        }
    )*};
}

/// The body of every native method.
pub(super) unsafe fn run<T: Answer>(
    env: *mut JNIEnv,
    class: jclass,
    work: impl FnOnce(&Env) -> Result<T>,
) -> T {
    let jni = Env { env, class };
    let outcome = crate::ffi::boundary::catch(|| work(&jni)).unwrap_or_else(|| {
        let internal = mor_status::MOR_ERROR_INTERNAL;
        // SAFETY: a text of the library's.
        Err(unsafe { Failure::status(internal, c"".as_ptr()) })
    });
    outcome.unwrap_or_else(|failure| {
        if let (Failure::Status(status, text), false) = (&failure, jni.thrown()) {
            jni.throw(*status, text);
        }
        T::NONE
    })
}

/// Java's environment on this thread, for the time of one native method.
pub(super) struct Env {
    pub env: *mut JNIEnv,
    /// `dev.mor.Native`, through which everything of Java's is called.
    pub class: jclass,
}

/// Calls a function of JNI's.
macro_rules! call {
    ($jni:expr, $function:ident $(, $arg:expr)*) => {{
        let env = $jni.env;
        // SAFETY: Java's table has the functions of JNI 1.6, which Android and every JVM have; the
        // environment is this thread's, and the arguments are live references of it.
        unsafe { ((**env).v1_6.$function)(env $(, $arg)*) }
    }};
}

/// An array of Java's and the functions that copy it.
macro_rules! array {
    ($read:ident, $new:ident, $item:ty, $as:ty, $region:ident, $make:ident, $set:ident) => {
        /// A copy of an array of Java's.
        pub fn $read(&self, array: jarray) -> Result<Vec<$item>> {
            let length = self.length(array)?;
            let mut items = reserved::<$item>(length)?;
            // The vector has room for so many, and any bytes are valid numbers.
            call!(
                self,
                $region,
                array,
                0,
                length as jsize,
                items.as_mut_ptr().cast::<$as>()
            );
            self.check()?;
            // SAFETY: they were written just now.
            unsafe { items.set_len(length) };
            Ok(items)
        }

        /// A new array of Java's.
        pub fn $new(&self, items: &[$item]) -> Result<jarray> {
            let length = jsize::try_from(items.len())
                .map_err(|_| Error::unsupported("an array of Java's of more than 2 GiB"))?;
            let array = call!(self, $make, length);
            if array.is_null() {
                return Err(Failure::Thrown);
            }
            call!(self, $set, array, 0, length, items.as_ptr().cast::<$as>());
            self.check()?;
            Ok(array)
        }
    };
}

impl Env {
    /// Whether Java has an exception, with which next to nothing may be called.
    pub fn thrown(&self) -> bool {
        call!(self, ExceptionCheck)
    }

    pub fn check(&self) -> Result<()> {
        match self.thrown() {
            true => Err(Failure::Thrown),
            false => Ok(()),
        }
    }

    /// Calls `Native.fail`, which throws.
    fn throw(&self, status: mor_status, text: &str) {
        // Without memory for the text Java has thrown that.
        if let Ok(text) = self.new_bytes(text.as_bytes()) {
            let arguments = [jvalue { i: status as jint }, jvalue { l: text }];
            if let Ok(method) = self.method(c"fail", c"(I[B)V") {
                call!(
                    self,
                    CallStaticVoidMethodA,
                    self.class,
                    method,
                    arguments.as_ptr()
                );
            }
        }
    }

    /// A static method of `Native`.
    pub fn method(&self, name: &CStr, signature: &CStr) -> Result<jmethodID> {
        let (name, signature) = (name.as_ptr(), signature.as_ptr());
        let method = call!(self, GetStaticMethodID, self.class, name, signature);
        if method.is_null() {
            return Err(Failure::Thrown);
        }
        Ok(method)
    }

    /// Calls a method that answers a `boolean`; false also when it throws.
    pub fn ask(&self, method: jmethodID, arguments: &[jvalue]) -> bool {
        let class = self.class;
        let answer = call!(
            self,
            CallStaticBooleanMethodA,
            class,
            method,
            arguments.as_ptr()
        );
        answer && !self.thrown()
    }

    /// Gives a reference back: those of a long method would be kept until it returns.
    pub fn forget(&self, object: jobject) {
        call!(self, DeleteLocalRef, object);
    }

    pub fn keep(&self, object: jobject) -> Result<jobject> {
        let kept = call!(self, NewGlobalRef, object);
        match kept.is_null() {
            true => Err(Error::OutOfMemory { bytes: 0 }.into()),
            false => Ok(kept),
        }
    }

    /// Ends what [`Env::keep`] began.
    pub fn drop_kept(&self, object: jobject) {
        call!(self, DeleteGlobalRef, object);
    }

    pub fn machine(&self) -> Result<*mut JavaVM> {
        let mut machine = std::ptr::null_mut();
        match call!(self, GetJavaVM, &mut machine) {
            JNI_OK => Ok(machine),
            _ => Err(Error::unsupported("a Java environment without a machine").into()),
        }
    }

    pub fn length(&self, array: jarray) -> Result<usize> {
        if array.is_null() {
            return Err(Failure::argument("an array is null"));
        }
        // Never negative.
        Ok(call!(self, GetArrayLength, array) as usize)
    }

    array!(
        bytes,
        new_bytes,
        u8,
        jbyte,
        GetByteArrayRegion,
        NewByteArray,
        SetByteArrayRegion
    );
    array!(
        ints,
        new_ints,
        u32,
        jint,
        GetIntArrayRegion,
        NewIntArray,
        SetIntArrayRegion
    );
    array!(
        longs,
        new_longs,
        i64,
        jlong,
        GetLongArrayRegion,
        NewLongArray,
        SetLongArrayRegion
    );

    /// Copies numbers to the beginning of an array of Java's, which must have room.
    pub fn put_floats(&self, array: jfloatArray, floats: &[f32]) -> Result<()> {
        let length = self.length(array)?;
        if length < floats.len() {
            let needed = floats.len();
            return Err(Error::BufferTooSmall {
                needed,
                capacity: length,
            }
            .into());
        }
        // At most the array's length, which is a jsize.
        call!(
            self,
            SetFloatArrayRegion,
            array,
            0,
            floats.len() as jsize,
            floats.as_ptr()
        );
        self.check()
    }

    /// A text with a zero byte behind it, for functions that take one. It can have none inside.
    pub fn text(&self, array: jbyteArray, what: &str) -> Result<Vec<u8>> {
        let mut text = self.bytes(array)?;
        if text.contains(&0) {
            return Err(Failure::argument(format_args!(
                "{what} has a zero character inside"
            )));
        }
        text.try_reserve_exact(1)
            .map_err(|_| Error::OutOfMemory { bytes: 1 })?;
        text.push(0);
        Ok(text)
    }

    /// As [`Env::text`], of every element of an array.
    pub fn texts(&self, array: jobjectArray, what: &str) -> Result<Vec<Vec<u8>>> {
        let length = self.length(array)?;
        let mut texts = reserved(length)?;
        for i in 0..length {
            let element = call!(self, GetObjectArrayElement, array, i as jsize);
            let text = self.text(element, what);
            self.forget(element);
            texts.push(text?);
        }
        Ok(texts)
    }

    /// The bytes of a text of the library's.
    pub fn new_text(&self, text: *const c_char) -> Result<jbyteArray> {
        // SAFETY: the library's texts end with a zero byte.
        self.new_bytes(unsafe { CStr::from_ptr(text) }.to_bytes())
    }

    /// The memory of a direct buffer, whole.
    pub fn buffer(&self, buffer: jobject) -> Result<(*mut c_void, usize)> {
        let direct = || Failure::argument("the buffer is not direct (ByteBuffer.allocateDirect)");
        if buffer.is_null() {
            return Err(direct());
        }
        let start = call!(self, GetDirectBufferAddress, buffer);
        let bytes = call!(self, GetDirectBufferCapacity, buffer);
        let bytes = usize::try_from(bytes).map_err(|_| direct())?;
        if start.is_null() && bytes > 0 {
            return Err(direct());
        }
        Ok((start, bytes))
    }
}

/// A size from Java, which knows no unsigned numbers.
pub(super) fn size(number: jlong, what: &str) -> Result<usize> {
    usize::try_from(number).map_err(|_| {
        Failure::argument(format_args!(
            "{what} is {number}, which is no size on this machine"
        ))
    })
}

/// The outcome of a function that takes a `mor_error`.
pub(super) fn outcome(jni: &Env, status: mor_status, error: &mor_error) -> Result<()> {
    // A log that threw comes first.
    jni.check()?;
    match status {
        mor_status::MOR_OK => Ok(()),
        // SAFETY: written by the call that failed.
        status => Err(unsafe { Failure::status(status, error.text.as_ptr()) }),
    }
}

/// A `mor_error` to be written to.
pub(super) fn no_error() -> mor_error {
    mor_error {
        status: mor_status::MOR_OK,
        text: [0; MOR_ERROR_TEXT_BYTES],
    }
}
