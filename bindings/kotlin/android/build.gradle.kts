import org.jetbrains.kotlin.gradle.dsl.JvmTarget

plugins {
    id("com.android.library")
    kotlin("android")
    `maven-publish`
}

val least = 21
val targets = mapOf(
    "arm64-v8a" to "aarch64-linux-android",
    "x86_64" to "x86_64-linux-android",
    "armeabi-v7a" to "armv7-linux-androideabi",
)
// Fewer to build while trying things out: -Pmor.abis=arm64-v8a
val abis = (findProperty("mor.abis") as String?)?.split(',') ?: targets.keys.toList()

android {
    namespace = "dev.mor.android"
    compileSdk = 35
    // 27 and later; what is aligned to 16 KiB is said in the library's build.rs.
    ndkVersion = "28.2.13676358"
    defaultConfig {
        minSdk = least
        consumerProguardFiles("consumer-rules.pro")
        ndk { abiFilters += abis }
    }
    compileOptions {
        sourceCompatibility = JavaVersion.VERSION_1_8
        targetCompatibility = JavaVersion.VERSION_1_8
    }
    sourceSets["main"].kotlin.srcDir("../mor/src/main/kotlin")
    sourceSets["main"].jniLibs.srcDir(layout.buildDirectory.dir("jniLibs"))
    publishing { singleVariant("release") { withSourcesJar() } }
}

kotlin {
    explicitApi()
    compilerOptions { jvmTarget = JvmTarget.JVM_1_8 }
}

// --- The native library: plain cargo, with the NDK's clang as the linker. --------------------------

val repository: File = rootDir.resolve("../..")
val host = when {
    System.getProperty("os.name").startsWith("Windows") -> "windows-x86_64"
    System.getProperty("os.name").startsWith("Mac") -> "darwin-x86_64"
    else -> "linux-x86_64"
}
val natives = abis.map { abi ->
    val target = targets.getValue(abi)
    val built = layout.buildDirectory.dir("cargo")
    val cargo = tasks.register<Exec>("cargo-$abi") {
        workingDir = repository
        // Clang has another name for this one.
        val clang = target.replace("armv7-", "armv7a-") + least + "-clang" +
            if (host.startsWith("windows")) ".cmd" else ""
        val linker = android.ndkDirectory.resolve("toolchains/llvm/prebuilt/$host/bin/$clang")
        environment("CARGO_TARGET_${target.uppercase().replace('-', '_')}_LINKER", linker.path)
        commandLine(
            "cargo", "rustc", "--profile", "small", "--lib", "--no-default-features",
            "--features", "jni,chat", "--crate-type", "cdylib", "--target", target,
            "--target-dir", built.get().asFile.path,
        )
    }
    tasks.register<Copy>("native-$abi") {
        dependsOn(cargo)
        from(built.map { it.file("$target/small/libmor.so") })
        rename { "libmor_jni.so" }
        into(layout.buildDirectory.dir("jniLibs/$abi"))
    }
}
// Android's loader refuses what tools/check-elf.py refuses; better here.
val checkElf by tasks.registering(Exec::class) {
    dependsOn(natives)
    val libraries = abis.map { layout.buildDirectory.file("jniLibs/$it/libmor_jni.so").get().asFile.path }
    commandLine(listOf("python3", repository.resolve("tools/check-elf.py").path) + libraries)
}
tasks.named("preBuild") { dependsOn(checkElf) }

publishing {
    publications.register<MavenPublication>("release") {
        artifactId = "mor-android"
        afterEvaluate { from(components["release"]) }
    }
}
