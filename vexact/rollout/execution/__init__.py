"""Running a step: inputs on the device, the forward pass, CUDA graphs of decode steps."""
