// Runs a bundle's model on Android. A sample to paste: no test of deploykit compiles it.
//
// In build.gradle.kts:  implementation("com.microsoft.onnxruntime:onnxruntime-android:VERSION")
// VERSION is the bundle's min_onnxruntime or newer. Put model.onnx and manifest.json into assets:
//
//     val classifier = Classifier(
//         assets.open("model.onnx").readBytes(),
//         assets.open("manifest.json").reader().readText(),
//     )
//     val answer = classifier.classify(classifier.pixelsOf(bitmap))
//
// Prove it once on the device: feed the inputs of golden/expected.npz, and compare the logits with
// its outputs, which may be off by tolerance.max_abs of manifest.json.

import ai.onnxruntime.OnnxJavaType
import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OrtEnvironment
import ai.onnxruntime.OrtSession
import android.graphics.Bitmap
import java.nio.ByteBuffer
import java.nio.ByteOrder
import kotlin.math.exp
import org.json.JSONArray
import org.json.JSONObject

class Classifier(model: ByteArray, manifest: String) : AutoCloseable {
    data class Answer(val label: String, val probability: Double)

    private val about = JSONObject(manifest)
    private val input = about.getJSONArray("inputs").getJSONObject(0)
    private val shape = input.getJSONArray("shape").let { sizes ->
        LongArray(sizes.length()) { if (it == 0) 1 else sizes.getLong(it) } // a batch of one
    }
    private val type = when (val name = input.getString("dtype")) {
        "uint8" -> OnnxJavaType.UINT8
        "float32" -> OnnxJavaType.FLOAT
        else -> error("expected uint8 or float32 inputs, got $name")
    }
    private val labels = about.getJSONArray("labels").strings()
    private val environment = OrtEnvironment.getEnvironment()
    private val session = OrtSession.SessionOptions().use { options ->
        options.setIntraOpNumThreads(about.getInt("threads"))
        environment.createSession(model, options)
    }

    /** Returns the logits of one sample: its elements in native byte order, rows one after the other. */
    fun logits(sample: ByteBuffer): FloatArray {
        sample.rewind()
        OnnxTensor.createTensor(environment, sample, shape, type).use { tensor ->
            session.run(mapOf(input.getString("name") to tensor)).use { result ->
                @Suppress("UNCHECKED_CAST")
                return (result[0].value as Array<FloatArray>)[0]
            }
        }
    }

    /** Returns the likeliest class of one sample. */
    fun classify(sample: ByteBuffer): Answer {
        val logits = logits(sample)
        val best = logits.indices.maxBy { logits[it] }
        val sum = logits.sumOf { exp((it - logits[best]).toDouble()) }
        return Answer(labels.getOrElse(best) { best.toString() }, 1 / sum)
    }

    /**
     * Returns the raw pixels of an image that has the model's size already: native/README.md tells
     * how it gets it. Normalization is inside the model.
     */
    fun pixelsOf(bitmap: Bitmap): ByteBuffer {
        val (height, width, channels) = shape.drop(1).map { it.toInt() }
        require(bitmap.height == height && bitmap.width == width) {
            "expected an image of $height x $width, got ${bitmap.height} x ${bitmap.width}"
        }
        val colours = IntArray(height * width)
        bitmap.getPixels(colours, 0, width, 0, 0, width, height)
        val pixels = ByteBuffer.allocateDirect(height * width * channels)
            .order(ByteOrder.nativeOrder())
        for (colour in colours) {
            val (red, green, blue) = listOf(16, 8, 0).map { colour shr it and 0xff }
            if (channels == 3) {
                listOf(red, green, blue).forEach { pixels.put(it.toByte()) }
            } else {
                val grey = (19595 * red + 38470 * green + 7471 * blue + 32768) shr 16
                pixels.put(grey.toByte())
            }
        }
        return pixels
    }

    override fun close() = session.close()

    private fun JSONArray.strings() = List(length()) { getString(it) }
}
