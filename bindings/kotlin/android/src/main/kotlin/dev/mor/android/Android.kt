@file:JvmName("MorAndroid")

package dev.mor.android

import android.content.res.AssetFileDescriptor
import android.content.res.AssetManager
import android.os.ParcelFileDescriptor
import dev.mor.LoadParams
import dev.mor.Model
import dev.mor.MorException
import java.io.FileNotFoundException
import java.io.IOException

/**
 * Loads a model out of the app's package, mapped where it lies: it is not unpacked, takes no
 * storage a second time, and its pages are given back when memory is short.
 *
 * The asset must not be compressed: `androidResources { noCompress += "gguf" }` in the app's build
 * file. Where it begins in the package does not matter.
 *
 * @param name the asset's name, such as "model.gguf"
 * @throws MorException.Unsupported when it is compressed
 * @throws MorException.Io when there is none of this name
 */
@JvmOverloads
public fun Model.Companion.loadAsset(
    assets: AssetManager,
    name: String,
    params: LoadParams = LoadParams(),
): Model {
    val asset = try {
        assets.openFd(name)
    } catch (failure: FileNotFoundException) {
        // The system says the same of both.
        throw if (assets.has(name)) {
            MorException.Unsupported(
                "the asset '$name' is compressed; add androidResources { noCompress += \"gguf\" }",
            )
        } else {
            MorException.Io("there is no asset '$name': ${failure.message}")
        }
    }
    return asset.use { load(it, params) }
}

private fun AssetManager.has(name: String): Boolean = try {
    open(name).close()
    true
} catch (_: IOException) {
    false
}

/** Loads the part of a file that an asset is. The descriptor stays the caller's to close. */
@JvmOverloads
public fun Model.Companion.load(asset: AssetFileDescriptor, params: LoadParams = LoadParams()): Model {
    // Where the system does not know it, it is up to the file's end.
    val length = asset.length.takeIf { it != AssetFileDescriptor.UNKNOWN_LENGTH } ?: 0
    return loadDescriptor(asset.parcelFileDescriptor.fd, asset.startOffset, length, params)
}

/**
 * Loads an open file, such as one that the user has chosen:
 * `contentResolver.openFileDescriptor(uri, "r")`. The descriptor stays the caller's to close.
 */
@JvmOverloads
public fun Model.Companion.load(file: ParcelFileDescriptor, params: LoadParams = LoadParams()): Model =
    loadDescriptor(file.fd, params = params)
