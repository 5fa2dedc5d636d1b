// Runs a bundle's model on iOS and macOS. A sample to paste: no test of deploykit compiles it.
//
// CocoaPods:      pod 'onnxruntime-objc', '>= VERSION'           then: import onnxruntime_objc
// Swift packages: github.com/microsoft/onnxruntime-swift-package-manager, import OnnxRuntimeBindings
// VERSION is the bundle's min_onnxruntime. Add model.onnx and manifest.json to the app's resources:
//
//     let bundle = Bundle.main
//     let classifier = try Classifier(
//         model: bundle.url(forResource: "model", withExtension: "onnx")!,
//         manifest: bundle.url(forResource: "manifest", withExtension: "json")!)
//     let answer = try classifier.classify(pixels)
//
// Prove it once on the device: feed the inputs of golden/expected.npz, and compare the logits with
// its outputs, which may be off by tolerance.max_abs of manifest.json.

import Foundation
import onnxruntime_objc

final class Classifier {
    struct Answer {
        let label: String
        let probability: Double
    }

    struct Mismatch: Error {
        let message: String
    }

    private struct Tensor: Decodable {
        let name: String
        let dtype: String
        let shape: [Int]
    }

    private struct Manifest: Decodable {
        let inputs: [Tensor]
        let outputs: [Tensor]
        let labels: [String]
        let threads: Int32
    }

    private let manifest: Manifest
    private let environment: ORTEnv
    private let session: ORTSession

    init(model: URL, manifest url: URL) throws {
        manifest = try JSONDecoder().decode(Manifest.self, from: Data(contentsOf: url))
        environment = try ORTEnv(loggingLevel: .error)
        let options = try ORTSessionOptions()
        try options.setIntraOpNumThreads(manifest.threads)
        session = try ORTSession(env: environment, modelPath: model.path, sessionOptions: options)
    }

    /// Returns the logits of one sample: its elements as they lie in memory, rows one after the
    /// other. Of an image these are its raw pixels (height, width, channels), a byte each, as
    /// native/README.md tells; normalization is inside the model.
    func logits(_ sample: Data) throws -> [Float] {
        let input = manifest.inputs[0]
        let size = input.dtype == "uint8" ? 1 : 4
        let expected = input.shape.dropFirst().reduce(size, *)
        guard ["uint8", "float32"].contains(input.dtype), sample.count == expected else {
            throw Mismatch(message: "expected \(expected) bytes of \(input.dtype), got \(sample.count)")
        }
        let value = try ORTValue(
            tensorData: NSMutableData(data: sample),
            elementType: size == 1 ? .uInt8 : .float,
            shape: [1] + input.shape.dropFirst().map { NSNumber(value: $0) })
        let name = manifest.outputs[0].name
        let found = try session.run(
            withInputs: [input.name: value], outputNames: [name], runOptions: nil)
        guard let output = found[name] else {
            throw Mismatch(message: "expected an output called \(name), got none")
        }
        let data = try output.tensorData() as Data
        return data.withUnsafeBytes { Array($0.bindMemory(to: Float.self)) }
    }

    /// Returns the likeliest class of one sample.
    func classify(_ sample: Data) throws -> Answer {
        let logits = try self.logits(sample)
        guard let best = logits.indices.max(by: { logits[$0] < logits[$1] }) else {
            throw Mismatch(message: "expected logits, got none")
        }
        let sum = logits.reduce(0.0) { $0 + exp(Double($1 - logits[best])) }
        let label = manifest.labels.indices.contains(best) ? manifest.labels[best] : String(best)
        return Answer(label: label, probability: 1 / sum)
    }
}
