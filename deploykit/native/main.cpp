// Runs a bundle's model from C++: proves it by the golden samples, times it, classifies arrays.
//
//   sample BUNDLE              the golden samples, then the latency
//   sample BUNDLE FILE.npy...  the golden samples, then the likeliest class of each sample
//
// FILE.npy holds one sample as the model takes it, without the batch axis. Only the answers are
// compared here; the hashes of the files are checked by: python run.py selftest
//
// Exit codes: 0 done, 2 bad usage, 3 an array that cannot be used, 4 the bundle cannot be read or
// its model answers otherwise.

#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bundle.h"

namespace {

using Bytes = std::vector<char>;
using Path = std::filesystem::path;

constexpr int kUsage = 2, kBadInput = 3, kBroken = 4;

struct Failure : std::runtime_error {
  Failure(int code, const std::string& message) : std::runtime_error(message), code(code) {}
  int code;
};

Bytes read_file(const Path& path, int code) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw Failure(code, path.string() + ": cannot be read");
  return Bytes(std::istreambuf_iterator<char>(file), {});
}

// An unsigned number of `size` bytes, little-endian.
size_t number_at(const Bytes& data, size_t at, size_t size) {
  size_t value = 0;
  for (size_t i = size; i-- > 0;) value = value << 8 | static_cast<unsigned char>(data[at + i]);
  return value;
}

// Arrays: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html

struct Array {
  ONNXTensorElementDataType type;
  std::vector<int64_t> shape;
  Bytes data;  // rows one after the other
};

struct Element {
  const char* name;
  ONNXTensorElementDataType type;
  size_t size;
};

constexpr Element kElements[] = {
    {"|u1", ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, 1},
    {"|i1", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8, 1},
    {"<i4", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32, 4},
    {"<i8", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, 8},
    {"<f2", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, 2},
    {"<f4", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, 4},
    {"<f8", ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE, 8},
};

// What follows a key in the header, {'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }
std::string text_behind(const std::string& header, const std::string& key) {
  const std::string quoted = "'" + key + "': ";
  const size_t at = header.find(quoted);
  if (at == std::string::npos) throw std::invalid_argument("its header lacks " + key);
  return header.substr(at + quoted.size());
}

Element element_of(const std::string& header) {
  const std::string name = text_behind(header, "descr").substr(0, 5);
  for (const Element& one : kElements) {
    if (name == "'" + std::string(one.name) + "'") return one;
  }
  throw std::invalid_argument("its type is none that models take");
}

std::vector<int64_t> shape_of(const std::string& header) {
  const std::string text = text_behind(header, "shape");
  std::vector<int64_t> shape;
  const char* at = text.c_str() + 1;  // behind the parenthesis
  while (*at >= '0' && *at <= '9') {
    char* end = nullptr;
    shape.push_back(std::strtoll(at, &end, 10));
    at = end;
    while (*at == ',' || *at == ' ') ++at;
  }
  if (text[0] != '(' || *at != ')') throw std::invalid_argument("its shape cannot be read");
  return shape;
}

// Whether an array of this shape and element size takes exactly so many bytes.
bool fills(const std::vector<int64_t>& shape, size_t element, size_t bytes) {
  size_t size = element;
  for (const int64_t length : shape) {
    if (length <= 0 || size > bytes / static_cast<size_t>(length)) return false;
    size *= static_cast<size_t>(length);
  }
  return size == bytes;
}

Array parse_npy(const Bytes& file) {
  if (file.size() < 12 || std::memcmp(file.data(), "\x93NUMPY", 6) != 0) {
    throw std::invalid_argument("it does not begin as one");
  }
  const size_t width = file[6] == 1 ? 2 : 4;  // of the header's length, by the format's version
  const size_t start = 8 + width, length = number_at(file, 8, width);
  if (length > file.size() - start) throw std::invalid_argument("it is cut off");
  const std::string header(file.data() + start, length);
  const Element element = element_of(header);
  Array array{element.type, shape_of(header), Bytes(file.begin() + start + length, file.end())};
  if (text_behind(header, "fortran_order").rfind("False", 0) != 0) {
    throw std::invalid_argument("its columns lie one after the other, not its rows");
  }
  if (!fills(array.shape, element.size, array.data.size())) {
    throw std::invalid_argument("its size is not what its header says");
  }
  return array;
}

Array read_npy(const Bytes& file, const std::string& name, int code) {
  try {
    return parse_npy(file);
  } catch (const std::invalid_argument& error) {
    throw Failure(code, name + ": expected a .npy file: " + error.what());
  }
}

// An entry of a zip file without compression: a head of 30 bytes, the name, the data
// (https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT, 4.3.7).
Bytes stored_entry(const Bytes& zip, const std::string& name) {
  constexpr size_t kHead = 30;
  size_t at = 0;
  while (zip.size() - at >= kHead && number_at(zip, at, 4) == 0x04034b50) {
    const size_t method = number_at(zip, at + 8, 2), size = number_at(zip, at + 18, 4);
    const size_t name_size = number_at(zip, at + 26, 2), extra = number_at(zip, at + 28, 2);
    const size_t start = at + kHead + name_size + extra;
    if (method != 0 || start > zip.size() || size > zip.size() - start) break;
    const auto data = zip.begin() + static_cast<std::ptrdiff_t>(start);
    if (std::string(zip.data() + at + kHead, name_size) == name) {
      return Bytes(data, data + static_cast<std::ptrdiff_t>(size));
    }
    at = start + size;
  }
  throw Failure(kBroken, "golden/expected.npz: expected a stored " + name);
}

// Samples of an array from its first on; behind its end it begins again.
Array take(const Array& all, int64_t first, int64_t count) {
  const int64_t size = static_cast<int64_t>(all.data.size()) / all.shape[0];
  Array some{all.type, all.shape, {}};
  some.shape[0] = count;
  for (int64_t i = first; i < first + count; ++i) {
    const auto row = all.data.begin() + i % all.shape[0] * size;
    some.data.insert(some.data.end(), row, row + size);
  }
  return some;
}

// The model.

class Model {
 public:
  explicit Model(const Bytes& onnx)
      : session_(environment_, onnx.data(), onnx.size(), options()) {
    Ort::AllocatorWithDefaultOptions allocator;
    input_ = session_.GetInputNameAllocated(0, allocator).get();
    output_ = session_.GetOutputNameAllocated(0, allocator).get();
  }

  // Logits of a batch, the classes of one sample behind those of the other.
  std::vector<float> run(const Array& batch) {
    const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    auto* data = const_cast<char*>(batch.data.data());  // it is only read
    const Ort::Value value =
        Ort::Value::CreateTensor(memory, data, batch.data.size(), batch.shape.data(),
                                 batch.shape.size(), batch.type);
    const char* input = input_.c_str();
    const char* output = output_.c_str();
    const auto found = session_.Run(Ort::RunOptions{nullptr}, &input, &value, 1, &output, 1);
    const auto about = found[0].GetTensorTypeAndShapeInfo();
    if (about.GetElementType() != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) {
      throw Failure(kBroken, "model.onnx: expected float32 outputs");
    }
    const float* logits = found[0].GetTensorData<float>();
    std::vector<float> all(logits, logits + about.GetElementCount());
    if (!std::all_of(all.begin(), all.end(), [](float one) { return std::isfinite(one); })) {
      throw Failure(kBroken, "model.onnx: expected finite outputs, got NaN or infinity");
    }
    return all;
  }

 private:
  static Ort::SessionOptions options() {
    Ort::SessionOptions made;
    made.SetIntraOpNumThreads(bundle::kThreads);
    made.SetInterOpNumThreads(1);
    return made;
  }

  Ort::Env environment_{ORT_LOGGING_LEVEL_ERROR, "sample"};
  Ort::Session session_;
  std::string input_, output_;
};

size_t best(const float* logits, size_t classes) {
  return static_cast<size_t>(std::max_element(logits, logits + classes) - logits);
}

// The proof, by the rules of run.py.

struct Golden {
  Array inputs;
  std::vector<float> outputs;
  size_t classes;
};

Golden read_golden(const Path& file) {
  const Bytes zip = read_file(file, kBroken);
  Array inputs = read_npy(stored_entry(zip, "inputs.npy"), "inputs", kBroken);
  const Array outputs = read_npy(stored_entry(zip, "outputs.npy"), "outputs", kBroken);
  if (outputs.type != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT || outputs.shape.size() != 2 ||
      inputs.shape.empty() || inputs.shape[0] != outputs.shape[0]) {
    throw Failure(kBroken, "golden/expected.npz: expected float32 outputs of every input");
  }
  std::vector<float> values(outputs.data.size() / sizeof(float));
  std::memcpy(values.data(), outputs.data.data(), outputs.data.size());
  return {std::move(inputs), std::move(values), static_cast<size_t>(outputs.shape[1])};
}

// The largest difference from the stored outputs.
double compare(const Golden& golden, const std::vector<float>& found) {
  if (found.size() != golden.outputs.size()) {
    throw Failure(kBroken, "golden: expected " + std::to_string(golden.outputs.size()) +
                               " outputs, got " + std::to_string(found.size()));
  }
  double largest = 0;
  for (size_t i = 0; i < found.size(); ++i) {
    largest = std::max(largest, std::abs(double{found[i]} - double{golden.outputs[i]}));
  }
  if (!(largest <= bundle::kMaxAbs)) {
    throw Failure(kBroken, "golden: outputs differ by " + std::to_string(largest) +
                               ", allowed is " + std::to_string(bundle::kMaxAbs));
  }
  for (size_t row = 0; bundle::kTop1 && row < found.size(); row += golden.classes) {
    const float* stored = golden.outputs.data() + row;
    const size_t was = best(stored, golden.classes), is = best(&found[row], golden.classes);
    if (double{stored[was]} - double{stored[is]} > bundle::kNear) {
      throw Failure(kBroken, "golden: sample " + std::to_string(row / golden.classes) +
                                 ": expected class " + std::to_string(was) + ", got " +
                                 std::to_string(is) + ", and it is no near-tie");
    }
  }
  return largest;
}

void prove(Model& model, const Golden& golden) {
  const int64_t count = golden.inputs.shape[0];
  std::vector<float> singles;
  for (int64_t i = 0; i < count; ++i) {
    const std::vector<float> one = model.run(take(golden.inputs, i, 1));
    singles.insert(singles.end(), one.begin(), one.end());
  }
  const double largest =
      std::max(compare(golden, singles), compare(golden, model.run(golden.inputs)));
  std::printf("%lld golden samples answer as they did (largest difference %.3g, allowed %.3g)\n",
              static_cast<long long>(count), largest, bundle::kMaxAbs);
}

// What a user came for.

void time_batches(Model& model, const Golden& golden, int64_t size) {
  using Clock = std::chrono::steady_clock;
  const Array batch = take(golden.inputs, 0, size);
  for (int i = 0; i < 3; ++i) model.run(batch);  // memory is planned in the first runs
  std::vector<double> times_ms;
  const auto stop = Clock::now() + std::chrono::seconds(1);
  while (Clock::now() < stop || times_ms.size() < 5) {
    const auto start = Clock::now();
    model.run(batch);
    times_ms.push_back(std::chrono::duration<double, std::milli>(Clock::now() - start).count());
  }
  std::sort(times_ms.begin(), times_ms.end());
  std::printf("batch %lld: median %.3f ms, p90 %.3f ms (%d threads, %zu runs)\n",
              static_cast<long long>(size), times_ms[times_ms.size() / 2],
              times_ms[times_ms.size() * 9 / 10], bundle::kThreads, times_ms.size());
}

void classify(Model& model, const Golden& golden, const char* file) {
  Array sample = read_npy(read_file(file, kBadInput), file, kBadInput);
  sample.shape.insert(sample.shape.begin(), 1);
  if (sample.type != golden.inputs.type || sample.shape != take(golden.inputs, 0, 1).shape) {
    throw Failure(kBadInput, std::string(file) + ": expected the type and shape of a golden input");
  }
  const std::vector<float> logits = model.run(sample);
  const size_t likeliest = best(logits.data(), logits.size());
  double sum = 0;
  for (const float one : logits) sum += std::exp(double{one} - double{logits[likeliest]});
  const bool named = likeliest < static_cast<size_t>(bundle::kLabelCount);
  const std::string label = named ? bundle::kLabels[likeliest] : std::to_string(likeliest);
  std::printf("%s: %s %.4f\n", file, label.c_str(), 1 / sum);
}

int run(int count, char** arguments) {
  if (count < 2) throw Failure(kUsage, "expected: sample BUNDLE [FILE.npy...]");
  const Path folder(arguments[1]);
  Model model(read_file(folder / "model.onnx", kBroken));
  const Golden golden = read_golden(folder / "golden" / "expected.npz");
  prove(model, golden);
  for (int i = 2; i < count; ++i) classify(model, golden, arguments[i]);
  if (count == 2) {
    for (const int64_t size : {1, 32}) time_batches(model, golden, size);
  }
  return 0;
}

}  // namespace

int main(int count, char** arguments) {
  try {
    return run(count, arguments);
  } catch (const Failure& failure) {
    std::fprintf(stderr, "error: %s\n", failure.what());
    return failure.code;
  } catch (const std::exception& error) {  // ONNX Runtime's own among them
    std::fprintf(stderr, "error: model.onnx: %s\n", error.what());
    return kBroken;
  }
}
