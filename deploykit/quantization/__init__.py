"""From a float graph to an integer graph that ONNX Runtime fuses."""
