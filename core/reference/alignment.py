"""HiFi Tuner (Wang et al. 2023, arXiv 2312.00079), eq. 9 and Algorithm 4: the transform that aligns two masks.

T = Scale(theta_1) Rotate(theta_2) Translate(theta_3, theta_4), with the translation applied first, is fitted by
gradient steps on nearest-point distances. As printed, Algorithm 4 sums over the points of the reference mask alone, so
any T that shrinks the reference to a place inside the target has zero loss; that form is available as `literal`. The
default adds the distances from the target's points to the reference's, as eq. 9 requires, and starts from the masks'
moments at several angles, because a wrong rotation is a local minimum.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

COARSE_POINTS, COARSE_STEPS, STARTS = 150, 40, 12
FINE_POINTS, FINE_STEPS, FINALISTS = 500, 60, 2
LEARNING_RATE = 0.03
POLISH_STEPS, POLISH_RATE = 40, 0.01
TIE = 0.02  # IoU difference that counts as a tie; the smallest rotation wins, as balls and stars fit at many angles
LITERAL_STEPS = 300
SMALLEST = 16  # minimum number of mask pixels


@dataclass(frozen=True)
class Alignment:
    """matrix [2, 3]: maps a point (x, y) of the reference to the target, both in -1 .. 1 of a square frame with the
    image's longer side. iou: of the transformed reference mask and the target mask.
    """

    matrix: Tensor
    iou: float

    @property
    def scale(self) -> float:
        return float(self.matrix[:, :2].norm() / math.sqrt(2))

    @property
    def degrees(self) -> float:
        return math.degrees(math.atan2(float(self.matrix[1, 0]), float(self.matrix[0, 0])))


def points(mask: Tensor) -> Tensor:
    """The set pixels of a mask [H, W] as centred points [N, 2] (x, y), in units of half the longer side."""
    rows, columns = torch.nonzero(mask > 0.5, as_tuple=True)
    height, width = mask.shape
    half = max(height, width) / 2
    return torch.stack([(columns + 0.5 - width / 2) / half, (rows + 0.5 - height / 2) / half], 1).float()


def matrices(theta: Tensor) -> Tensor:
    """[B, 2, 3] of theta [B, 4]: log scale, angle in radians, translation x and y."""
    cos, sin = theta[:, 1].cos(), theta[:, 1].sin()
    turn = torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)
    linear = theta[:, 0].exp()[:, None, None] * turn
    return torch.cat([linear, linear @ theta[:, 2:, None]], 2)


def nearest_distances(matrix: Tensor, reference: Tensor, target: Tensor, literal: bool) -> Tensor:
    """Mean squared distance [B] of each reference point, transformed by each of the matrices [B, 2, 3], to its nearest
    target point, and, unless literal, of each target point to its nearest reference point.
    """
    at = reference @ matrix[:, :, :2].transpose(1, 2) + matrix[:, None, :, 2]
    distances = torch.cdist(at.detach(), target.expand(at.shape[0], -1, -1))
    loss = (at - target[distances.argmin(2)]).square().sum(2).mean(1)
    if literal:
        return loss
    index = distances.argmin(1)[..., None].expand(-1, -1, 2)
    return loss + (at.gather(1, index) - target).square().sum(2).mean(1)


def _subsample(at: Tensor, count: int) -> Tensor:
    """At most `count` of the points, the same ones in every call."""
    if len(at) <= count:
        return at
    order = torch.randperm(len(at), generator=torch.Generator().manual_seed(0))
    return at[order[:count].to(at.device)]


def _descend(theta: Tensor, reference: Tensor, target: Tensor, steps: int, literal: bool = False) -> Tensor:
    theta = theta.detach().clone().requires_grad_(True)
    optimizer = torch.optim.Adam([theta], lr=LEARNING_RATE)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - 0.9 * step / steps)
        optimizer.zero_grad(set_to_none=True)
        nearest_distances(matrices(theta), reference, target, literal).sum().backward()
        optimizer.step()
    return theta.detach()


def _from_moments(reference: Tensor, target: Tensor, angles: Tensor) -> Tensor:
    """Initial theta [len(angles), 4] for each angle: equal area and centre."""
    theta = torch.zeros(len(angles), 4)
    theta[:, 0] = math.log(math.sqrt(len(target) / len(reference)))
    theta[:, 1] = angles
    linear = matrices(theta)[:, :, :2]
    centre = target.mean(0)[None, :, None]
    theta[:, 2:] = (torch.linalg.inv(linear) @ centre)[..., 0] - reference.mean(0)
    return theta


def align(reference: Tensor, target: Tensor, literal: bool = False, max_degrees: float = 180.0) -> Alignment:
    """The transform that aligns the reference mask [H, W] with the target mask [h, w]; values in 0..1.

    max_degrees limits the initial angles. ValueError for masks with too few set pixels.
    """
    reference_xy, target_xy = points(reference), points(target)
    for name, at in (("reference", reference_xy), ("target", target_xy)):
        if len(at) < SMALLEST:
            raise ValueError(
                f"The {name} mask has {len(at)} set pixels, {SMALLEST} are needed: check that the subject was found."
            )
    coarse = _subsample(reference_xy, COARSE_POINTS), _subsample(target_xy, COARSE_POINTS)
    fine = _subsample(reference_xy, FINE_POINTS), _subsample(target_xy, FINE_POINTS)
    if literal:
        matrix = matrices(_descend(torch.zeros(1, 4), *fine, LITERAL_STEPS, True))[0]
        return Alignment(matrix, overlap(reference, target, matrix))
    limit = math.radians(max_degrees)
    circle = max_degrees >= 180  # whose two ends are one angle
    angles = torch.linspace(-limit, limit, STARTS + circle)[:STARTS]
    theta = _descend(_from_moments(reference_xy, target_xy, angles), *coarse, COARSE_STEPS)
    best = nearest_distances(matrices(theta), *coarse, False).argsort()[:FINALISTS].tolist()
    upright = int(theta[:, 1].abs().argmin())
    theta = _descend(theta[sorted({*best, upright})], *fine, FINE_STEPS)
    theta = torch.cat([_polish(each, reference, target) for each in theta.split(1)])
    alignments = [Alignment(matrix, overlap(reference, target, matrix)) for matrix in matrices(theta)]
    best_iou = max(alignment.iou for alignment in alignments)
    return min((each for each in alignments if each.iou > best_iou - TIE), key=lambda alignment: abs(alignment.degrees))


def _polish(theta: Tensor, reference: Tensor, target: Tensor) -> Tensor:
    """theta [1, 4] after gradient steps on the overlap itself, which counts border pixels; nearest points do not."""
    theta = theta.detach().clone().requires_grad_(True)
    optimizer = torch.optim.Adam([theta], lr=POLISH_RATE)
    mask, goal = reference[None, None].float(), target.float()
    best, best_loss = theta.detach().clone(), math.inf
    for _ in range(POLISH_STEPS):
        warped = warp(mask, matrices(theta)[0], (target.shape[0], target.shape[1]), "zeros")[0, 0]
        loss = 1 - torch.minimum(warped, goal).sum() / torch.maximum(warped, goal).sum()
        if float(loss.detach()) < best_loss:
            best, best_loss = theta.detach().clone(), float(loss.detach())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return best


def overlap(reference: Tensor, target: Tensor, matrix: Tensor) -> float:
    """IoU of the transformed reference mask and the target mask."""
    one = warp(reference[None, None].float(), matrix, (target.shape[0], target.shape[1]), "zeros")[0, 0] > 0.5
    other = target > 0.5
    return float((one & other).sum() / (one | other).sum().clamp(min=1))


def warp(images: Tensor, matrix: Tensor, size: tuple[int, int], outside: str = "border") -> Tensor:
    """Transform images [B, C, H, W] into a frame of size (h, w); outside is grid_sample's padding_mode.

    "border" repeats the edge, because black edges would be inverted along with the image.
    """
    frame = _frame(images.shape[-2], images.shape[-1]), _frame(*size)
    square = torch.cat([matrix.double(), torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64)])
    back = torch.linalg.inv(square)
    back = torch.linalg.inv(torch.diag(frame[0])) @ back @ torch.diag(frame[1])
    grid = F.affine_grid(back[:2].float()[None].expand(len(images), -1, -1), [len(images), 1, *size], False)
    return F.grid_sample(images.float(), grid.to(images.device), "bilinear", outside, align_corners=False)


def _frame(height: int, width: int) -> Tensor:
    """The image's extent in the square frame, (x, y, 1)."""
    longer = max(height, width)
    return torch.tensor([width / longer, height / longer, 1.0], dtype=torch.float64)
