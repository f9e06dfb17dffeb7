"""The toy world: an integer seed -> a scene, its caption and its pixels; what captions say, and batches made of scenes.

scene <- wording <- grammar, dense, translations <- captions <- world
"""
