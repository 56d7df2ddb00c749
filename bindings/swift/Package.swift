// swift-tools-version: 6.0
import Foundation
import PackageDescription

// The library in C: the framework that xcframework.sh makes, where there is one, else libmor as
// installed on this system, which pkg-config finds (test.sh shows how to use one that is not).
let framework = "mor.xcframework"
let hasFramework = FileManager.default.fileExists(
    atPath: Context.packageDirectory + "/" + framework)

let package = Package(
    name: "Mor",
    platforms: [.macOS(.v14), .iOS(.v17), .visionOS(.v1)],
    products: [.library(name: "Mor", targets: ["Mor"])],
    targets: [
        hasFramework
            ? .binaryTarget(name: "CMor", path: framework)
            : .systemLibrary(name: "CMor", pkgConfig: "mor"),
        .target(name: "Mor", dependencies: ["CMor"]),
        .testTarget(name: "MorTests", dependencies: ["Mor"]),
    ],
    swiftLanguageModes: [.v6]
)
