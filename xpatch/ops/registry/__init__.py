"""The operators registered with torch, one file each: schema, fake, kernels per device, autograd."""
