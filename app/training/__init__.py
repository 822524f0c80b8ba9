"""What training is made of: data, methods, the loop. Engine children only; heavy imports in functions and *_torch.py files."""
