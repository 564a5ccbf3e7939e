"""The chunk executor: strategies, blending, timing."""
