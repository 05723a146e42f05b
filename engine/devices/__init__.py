"""The devices: one interface, and its implementations for CPU, CUDA and tests."""
