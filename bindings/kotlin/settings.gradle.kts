// The Kotlin binding: `mor` is the library for the JVM, `android` the same as an AAR, `coroutines` adds
// flows to either, `sample` is an app.
pluginManagement {
    repositories {
        google()
        mavenCentral()
        gradlePluginPortal()
    }
}

dependencyResolutionManagement {
    repositories {
        google()
        mavenCentral()
    }
}

rootProject.name = "mor-kotlin"
include("mor", "coroutines")

// Without Android's SDK the others build all the same.
val sdk = System.getenv("ANDROID_HOME") ?: System.getenv("ANDROID_SDK_ROOT")
if (sdk != null || file("local.properties").exists()) include("android", "sample")
