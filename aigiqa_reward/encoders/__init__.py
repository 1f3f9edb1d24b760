"""Pretrained towers, one file per library; a configuration names the weights and loads none.

Example:
    >>> from aigiqa_reward.encoders.blip import BLIPConfig
    >>> from aigiqa_reward.encoders.open_clip import OpenCLIPConfig
    >>> BLIPConfig(path_or_id="Salesforce/blip-itm-large-coco", window=35).window
    35
    >>> clip = OpenCLIPConfig(architecture="ViT-L-14", pretrained="laion2b_s32b_b82k")
    >>> clip.architecture  # create_reward("tsp_mgs", encoder=clip), or TrainingPlan(towers={"clip": clip})
    'ViT-L-14'
"""
