"""Generated from the .proto files beside this one; `proto/generate` makes them anew."""
