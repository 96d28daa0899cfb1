"""Who carries out a fused site: FlashInfer's kernels or the reference, chosen, made and tested by all ranks."""
