"""Settings of the fit."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings, tuned by cross-validation on the 240 prompts of AGIQA-3K.

    A noise is a variance, in units of the variance of the scores that likeness explains.

    Attributes:
        width: mean squared length of u, which sets how fast likeness falls.
        noise: noise of human scores.
        correspondence_noise: factor of the noise of correspondence scores, which an image alone predicts less well.
        quality_share: share of predicted quality in the correspondence predicted from the image alone.
        spoilt_noise: noise of the targets of degraded images.
        spoilt_quality: share of its quality that an image has lost at degradation level 1.
        spoilt_correspondence: share of its correspondence that it has lost there.
        world_noise: noise of the targets of pictures of the embedded world.
        world_quality: quality target of a clean one.
        world_every: distance of the pictures that are taken as centers.
        variance_noise: noise of the log of squared errors.
        least_error: constant added to an error before its log is taken.
        match_ridge: regularization of the map from images, as a share of their Gram matrix's mean diagonal.
        match_text_ridge: regularization of the map to texts.
        match_learned: weight of the learned map against ImageNet's class names.
        match_weight: correspondence that one standard deviation of the match adds.
        color_scale: weight of the colors among the features of the map.
        noun_share: correspondence that the world's right object adds.
        color_share: correspondence that its right color adds.
        place_ridge: regularization of the world's map, from images.
        text_ridge: regularization of the world's map, to texts.
        guard_shrinkage: shrinkage of the covariance of scored images, in mean variances.
        guard_known: share of the scored images, on unseen prompts, that are trusted fully.
        guard_softness: share of that limit by which trust falls to one half.
    """

    width: float = 0.3
    noise: float = 0.1
    correspondence_noise: float = 10.0
    quality_share: float = 0.5
    spoilt_noise: float = 0.4
    spoilt_quality: float = 0.6
    spoilt_correspondence: float = 0.2
    world_noise: float = 0.3
    world_quality: float = 0.4
    world_every: int = 2
    variance_noise: float = 3.0
    least_error: float = 0.02
    match_ridge: float = 20.0
    match_text_ridge: float = 6.0
    match_learned: float = 2.0
    match_weight: float = 0.07
    color_scale: float = 3.0
    noun_share: float = 0.42
    color_share: float = 0.35
    place_ridge: float = 0.03
    text_ridge: float = 0.3
    guard_shrinkage: float = 0.5
    guard_known: float = 0.998
    guard_softness: float = 0.3
