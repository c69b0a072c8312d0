"""All code that knows DeepSpeed: its configuration, engine, partitions, offload to nvme, compiled ops."""
