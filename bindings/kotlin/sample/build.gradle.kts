import org.jetbrains.kotlin.gradle.dsl.JvmTarget

plugins {
    id("com.android.application")
    kotlin("android")
}

android {
    namespace = "dev.mor.sample"
    compileSdk = 35
    defaultConfig {
        applicationId = "dev.mor.sample"
        minSdk = 21
        targetSdk = 35
        versionCode = 1
        versionName = project.version.toString()
    }
    compileOptions {
        sourceCompatibility = JavaVersion.VERSION_1_8
        targetCompatibility = JavaVersion.VERSION_1_8
    }
    buildTypes { release { isMinifyEnabled = true } }
    // The repository's small model, as it is; mapped, so not compressed.
    sourceSets["main"].assets.srcDir("../../../models")
    androidResources { noCompress += "gguf" }
}

kotlin { compilerOptions { jvmTarget = JvmTarget.JVM_1_8 } }

dependencies { implementation(project(":android")) }
