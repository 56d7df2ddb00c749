import org.jetbrains.kotlin.gradle.dsl.JvmTarget

plugins {
    kotlin("jvm")
    `java-library`
    `maven-publish`
}

kotlin {
    explicitApi()
    compilerOptions {
        jvmTarget = JvmTarget.JVM_1_8
        // Of the JDK's classes too, only what Java 8 has.
        freeCompilerArgs.add("-Xjdk-release=1.8")
    }
}

java {
    sourceCompatibility = JavaVersion.VERSION_1_8
    targetCompatibility = JavaVersion.VERSION_1_8
    withSourcesJar()
}

// The native library of the machine that builds, inside the jar, where NativeLibrary looks for it.
val repository: File = rootDir.resolve("../..")
val cargo by tasks.registering(Exec::class) {
    workingDir = repository
    commandLine(
        "cargo", "rustc", "--profile", "small", "--lib", "--no-default-features", "--features", "jni,chat",
        "--crate-type", "cdylib", "--target-dir", layout.buildDirectory.dir("cargo").get().asFile.path,
    )
}
val native by tasks.registering(Copy::class) {
    dependsOn(cargo)
    val system = System.getProperty("os.name").lowercase().substringBefore(' ')
    val processor = when (val name = System.getProperty("os.arch").lowercase()) {
        "amd64" -> "x86_64"
        "arm64" -> "aarch64"
        else -> name
    }
    from(layout.buildDirectory.file("cargo/small/" + System.mapLibraryName("mor")))
    rename { System.mapLibraryName("mor_jni") }
    into(layout.buildDirectory.dir("natives/dev/mor/natives/$system-$processor"))
}
tasks.jar {
    dependsOn(native)
    from(layout.buildDirectory.dir("natives"))
}

publishing {
    publications.create<MavenPublication>("jvm") {
        artifactId = "mor"
        from(components["java"])
    }
}
