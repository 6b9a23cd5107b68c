"""Hyper-network editors: a network trained beforehand turns the gradient of an edit into low-rank changes of linear layers.

What KnowledgeEditor, MEND and LiME share: the linears they change, the gradient's factors, the low-rank side path, the training.
"""
