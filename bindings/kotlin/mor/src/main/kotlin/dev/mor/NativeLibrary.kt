package dev.mor

import java.io.File

/** Finds and loads the native library. */
internal object NativeLibrary {
    /** `libmor_jni.so`: not libmor.so, which is the C library and has no native methods. */
    private const val NAME = "mor_jni"

    fun load() {
        val path = System.getProperty("dev.mor.library")
        if (path != null) return System.load(path)
        // Inside the jar, where there is one for this system; Android has it in the package.
        val name = System.mapLibraryName(NAME)
        val resource = javaClass.getResource("/dev/mor/natives/${platform()}/$name")
            ?: return System.loadLibrary(NAME)
        val copy = File.createTempFile("mor", name)
        try {
            resource.openStream().use { from -> copy.outputStream().use { from.copyTo(it) } }
            System.load(copy.path)
        } finally {
            // What is loaded stays; where the system does not let it go now, it goes at the end.
            if (!copy.delete()) copy.deleteOnExit()
        }
    }

    /** As in `linux-x86_64`. */
    private fun platform(): String {
        val system = System.getProperty("os.name").orEmpty().lowercase()
        val processor = when (val name = System.getProperty("os.arch").orEmpty().lowercase()) {
            "amd64" -> "x86_64"
            "arm64" -> "aarch64"
            else -> name
        }
        return "${system.substringBefore(' ')}-$processor"
    }
}
