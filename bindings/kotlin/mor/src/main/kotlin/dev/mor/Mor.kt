package dev.mor

/** The library as a whole. */
public object Mor {
    /** Its version, as "1.2.3". */
    @JvmStatic
    public val version: String get() = Native.version().decodeToString()

    /**
     * How many models, tokenizers, sessions and batches there are that were not closed: what leaks,
     * when it grows.
     */
    @JvmStatic
    public val liveObjects: Int get() = Handle.live.get()
}
