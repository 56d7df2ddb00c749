// swift-tools-version: 6.0
import PackageDescription

let package = Package(
    name: "MorChat",
    platforms: [.macOS(.v14), .iOS(.v17)],
    dependencies: [.package(name: "Mor", path: "..")],
    targets: [
        .executableTarget(
            name: "MorChat", dependencies: [.product(name: "Mor", package: "Mor")])
    ],
    swiftLanguageModes: [.v6]
)
