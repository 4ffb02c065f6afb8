"""What a run will need, before any weight is read: parameters, memory, operations, hours, disk.

Everything is counted on a model of the same classes, built from the same config on the meta device, where tensors have
shapes and no values. Nothing is kept by hand but what devices can do.
"""
