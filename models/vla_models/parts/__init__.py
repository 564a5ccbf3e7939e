"""What policies are made of: attention, vision, language, action heads. Torch modules, each written once."""
