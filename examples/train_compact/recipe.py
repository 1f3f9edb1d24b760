"""Settings of the fit."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings, chosen here by cross-validation on the 240 prompts at hand.

    A noise is a variance, in units of that of the scores which likeness explains.

    Attributes:
        width: mean squared length of u, which is how fast likeness falls.
        noise: of human scores.
        correspondence_noise: times as much in the correspondence scores, of which the image alone tells less.
        quality_share: share of predicted quality in what the image alone tells of correspondence.
        spoilt_noise: of what spoilt images are taught as.
        spoilt_quality: share of its quality that an image has lost at level 1.
        spoilt_correspondence: share of its correspondence.
        world_noise: of what pictures of the embedded world are taught as.
        world_quality: of a clean one.
        world_every: every how many of them are centers.
        variance_noise: of the log of squared errors.
        least_error: added to an error before its log is taken.
        match_ridge: regularization of the map from images, as a share of their Gram matrix's mean diagonal.
        match_text_ridge: of the map to texts.
        match_learned: how much the learned map counts, against ImageNet's class names.
        match_weight: what one deviation of the match adds to correspondence.
        color_scale: weight of the colors among the features of the map.
        noun_share: what the world's right thing is worth in correspondence.
        color_share: what its right color is worth.
        place_ridge: regularization of the world's map, from images.
        text_ridge: to texts.
        guard_shrinkage: of the covariance that climbs are held against, in mean variances.
        guard_known: share of the scored images, on unseen prompts, that are trusted wholly.
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
