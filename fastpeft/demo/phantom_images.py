"""Renderer of phantoms: scanners, anatomy, and the canvas that draws a scene.

Shapes are ellipses and rounded boxes with anti-aliased edges (coverage from a signed distance in pixels), in coordinates from -1
to 1. The order is anatomy, scanner grays, lesions, uneven light, blur, marker, frame, noise: lesions and marker are never hidden.
"""

from dataclasses import dataclass

import numpy as np

from fastpeft.demo.phantom_questions import EDGES, MODALITIES, SIZES, Scene


@dataclass(frozen=True)
class Scanner:
    """How a scene becomes an image. Lengths are in image half-widths, levels in 0 to 1."""

    gamma: float = 1.0  # exponent of the gray mapping
    window: tuple[float, float] = (0.0, 1.0)  # gray of the darkest and of the brightest tissue; (0.9, 0.1) is a negative
    lesion_grays: tuple[float, float] = (0.0, 1.0)  # of black and of white lesions
    noise: float = 0.02  # standard deviation
    grain: float = 0.0  # correlation length of the noise
    bias: float = 0.0  # strength of the smooth random gain field
    vignette: float = 0.0  # darkening at the corners
    blur: float = 0.01  # standard deviation of the point spread
    mirror: bool = False  # anatomy flipped left to right; answers stay those of the image
    flip: bool = False  # anatomy upside down, likewise
    frame: float = 0.0  # width of a border
    frame_gray: float = 0.5
    couch: bool = True  # the table's arc under an axial CT
    tint: tuple[float, float, float] = (1.0, 1.0, 1.0)  # gain of red, green and blue
    palette: tuple[tuple[str, tuple[int, int, int]], ...] = (
        ("Red", (225, 40, 40)),
        ("Green", (40, 185, 60)),
        ("Blue", (50, 80, 230)),
        ("Yellow", (240, 220, 50)),
    )
    held_out_phrases: bool = False  # ask partly in phrases the others never use


SCANNERS = {
    "a": Scanner(),
    # Foggy, noisy and uneven, with mirrored anatomy, a light frame and other marker inks.
    "b": Scanner(
        gamma=0.8,
        window=(0.32, 0.9),
        lesion_grays=(0.18, 0.92),
        noise=0.03,
        grain=0.02,
        bias=0.1,
        vignette=0.2,
        blur=0.02,
        mirror=True,
        frame=0.06,
        couch=False,
        tint=(0.9, 0.97, 1.06),
        palette=(("Red", (150, 50, 110)), ("Green", (60, 130, 130)), ("Blue", (120, 110, 190)), ("Yellow", (210, 130, 70))),
        held_out_phrases=True,
    ),
}

# Grays of tissues in CT and MRI, and what they add to the attenuation of a radiograph.
TISSUES = {
    "fat": (0.30, 0.88, 0.5),
    "soft": (0.46, 0.42, 0.4),
    "bone": (0.95, 0.10, 0.9),
    "air": (0.06, 0.04, -0.55),
    "fluid": (0.34, 0.85, 0.25),
    "brain": (0.52, 0.60, 0.25),
    "liver": (0.60, 0.30, 0.35),
    "heart": (0.66, 0.56, 0.55),
    "kidney": (0.72, 0.70, 0.30),
}

# (region, plane) -> shapes drawn in order: (tissue, "o" ellipse or "b" box, x, y, half-width, half-height[, degrees]). The first
# is the body: drawn as fat, then at 0.9 of its size as soft tissue.
ANATOMY = {
    ("Head", "Axial"): (
        ("fat", "o", 0, 0, 0.66, 0.8), ("bone", "o", 0, 0, 0.6, 0.74), ("brain", "o", 0, 0, 0.51, 0.65),
        ("fluid", "o", -0.12, -0.05, 0.06, 0.22, 12), ("fluid", "o", 0.12, -0.05, 0.06, 0.22, -12),
    ),
    ("Head", "Coronal"): (
        ("fat", "o", 0, -0.15, 0.62, 0.68), ("soft", "b", 0, 0.72, 0.3, 0.3), ("bone", "o", 0, -0.2, 0.56, 0.6),
        ("brain", "o", 0, -0.28, 0.48, 0.44), ("air", "o", -0.22, 0.26, 0.12, 0.09), ("air", "o", 0.22, 0.26, 0.12, 0.09),
        ("bone", "b", 0, 0.7, 0.1, 0.3),
    ),
    ("Head", "Sagittal"): (
        ("fat", "o", 0.05, -0.18, 0.76, 0.62), ("soft", "b", 0.25, 0.6, 0.26, 0.42, -8), ("soft", "o", -0.45, 0.3, 0.3, 0.3),
        ("bone", "o", 0.05, -0.22, 0.7, 0.54), ("brain", "o", 0.05, -0.24, 0.61, 0.43), ("brain", "o", 0.38, 0.2, 0.2, 0.14),
        ("bone", "b", 0.38, 0.66, 0.08, 0.34, -8),
    ),
    ("Chest", "Axial"): (
        ("fat", "o", 0, 0, 0.92, 0.66), ("air", "o", -0.43, -0.02, 0.33, 0.46, 8), ("air", "o", 0.43, -0.02, 0.33, 0.46, -8),
        ("heart", "o", 0.1, -0.12, 0.26, 0.28, 30), ("bone", "o", 0, 0.46, 0.13, 0.12),
    ),
    ("Chest", "Coronal"): (
        ("fat", "b", 0, 0.12, 0.84, 0.86), ("soft", "o", 0, -0.8, 0.22, 0.3), ("bone", "b", 0, 0.1, 0.07, 0.9),
        ("air", "o", -0.4, 0.02, 0.28, 0.6, 6), ("air", "o", 0.42, 0.02, 0.26, 0.6, -6),
        ("heart", "o", 0.14, 0.24, 0.28, 0.26, 30),
    ),
    ("Chest", "Sagittal"): (
        ("fat", "b", 0, 0.05, 0.54, 0.93), ("air", "o", -0.02, -0.05, 0.36, 0.66), ("heart", "o", -0.2, 0.3, 0.2, 0.26),
        ("bone", "b", 0.4, 0.05, 0.08, 0.9, 4),
    ),
    ("Abdomen", "Axial"): (
        ("fat", "o", 0, 0, 0.9, 0.68), ("liver", "o", -0.36, -0.1, 0.42, 0.4, 15), ("fluid", "o", 0.42, -0.2, 0.24, 0.2),
        ("kidney", "o", -0.4, 0.34, 0.13, 0.15), ("kidney", "o", 0.4, 0.34, 0.13, 0.15), ("bone", "o", 0, 0.38, 0.15, 0.15),
    ),
    ("Abdomen", "Coronal"): (
        ("fat", "b", 0, 0, 0.74, 0.95), ("liver", "o", -0.26, -0.46, 0.44, 0.34, 10), ("bone", "b", 0, 0.25, 0.09, 0.68),
        ("kidney", "o", -0.34, 0.24, 0.13, 0.24, 12), ("kidney", "o", 0.34, 0.2, 0.13, 0.24, -12),
    ),
    ("Abdomen", "Sagittal"): (
        ("fat", "b", 0, 0, 0.56, 0.94), ("liver", "o", -0.14, -0.42, 0.34, 0.4), ("kidney", "o", 0.2, 0.26, 0.13, 0.22),
        ("bone", "b", 0.4, 0, 0.08, 0.88, -4),
    ),
    ("Pelvis", "Axial"): (
        ("fat", "o", 0, 0, 0.94, 0.6), ("bone", "o", -0.58, 0.04, 0.13, 0.34, 25), ("bone", "o", 0.58, 0.04, 0.13, 0.34, -25),
        ("fluid", "o", 0, -0.1, 0.28, 0.22), ("bone", "o", 0, 0.4, 0.24, 0.1),
    ),
    ("Pelvis", "Coronal"): (
        ("fat", "b", 0, 0, 0.88, 0.8), ("bone", "o", -0.5, -0.3, 0.16, 0.42, 30), ("bone", "o", 0.5, -0.3, 0.16, 0.42, -30),
        ("bone", "b", -0.56, 0.58, 0.09, 0.34, -8), ("bone", "b", 0.56, 0.58, 0.09, 0.34, 8), ("fluid", "o", 0, 0.16, 0.26, 0.22),
    ),
    ("Pelvis", "Sagittal"): (
        ("fat", "b", 0, 0, 0.62, 0.8), ("bone", "o", 0.4, -0.2, 0.11, 0.52, -18), ("bone", "o", -0.36, 0.44, 0.12, 0.16),
        ("fluid", "o", -0.14, 0.1, 0.24, 0.24),
    ),
}  # fmt: skip

RADIOGRAPH = MODALITIES.index("X-Ray")


class Canvas:
    """Draws scenes at one image size under one scanner; what depends on the size alone is computed once."""

    def __init__(self, size: int, scanner: Scanner) -> None:
        self.size, self.scanner, self.pixel = size, scanner, 2 / size
        line = (np.arange(size, dtype=np.float32) + 0.5) * self.pixel - 1
        self.y, self.x = np.meshgrid(line, line, indexing="ij")
        self.radius2 = self.x**2 + self.y**2
        self.palette = dict(scanner.palette)
        knots = np.linspace(-1, 1, 6, dtype=np.float32)
        self.smooth = np.maximum(0, 1 - np.abs(line[:, None] - knots) / (knots[1] - knots[0]))  # [size, 6]: hat functions
        self.blur, self.grain = self._gauss(line, scanner.blur), self._gauss(line, scanner.grain)
        self.grain_gain = 1 / np.mean(np.sum(self.grain**2, axis=1))  # blurred noise keeps its standard deviation

    @staticmethod
    def _gauss(line: np.ndarray, width: float) -> np.ndarray:
        weights = np.exp(-0.5 * ((line[:, None] - line) / max(width, 1e-3)) ** 2)
        return (weights / weights.sum(1, keepdims=True)).astype(np.float32)

    def field(self, rng: np.random.Generator) -> np.ndarray:
        """A smooth random field, standard deviation below 1."""
        return self.smooth @ rng.standard_normal((6, 6), dtype=np.float32) @ self.smooth.T

    def shape(self, kind, x, y, cx, cy, rx, ry, degrees=0.0) -> tuple[np.ndarray, np.ndarray]:
        """A shape in ANATOMY's terms at points x, y: coverage, and depth below the outline (1 at the centre)."""
        cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
        u, v = np.abs(cos * (x - cx) + sin * (y - cy)), np.abs(cos * (y - cy) - sin * (x - cx))
        if kind == "b":
            corner = 0.3 * min(rx, ry)
            p, q = u - rx + corner, v - ry + corner
            distance = np.sqrt(np.maximum(p, 0) ** 2 + np.maximum(q, 0) ** 2) + np.minimum(np.maximum(p, q), 0) - corner
            depth = 1 - np.maximum(u / rx, v / ry) ** 4
        else:
            k2 = (u / rx) ** 2 + (v / ry) ** 2
            k = np.sqrt(k2)
            distance = k * (k - 1) / np.maximum(np.hypot(u / rx**2, v / ry**2), 1e-6)  # exact to first order at the outline
            depth = 1 - k2
        return np.clip(0.5 - distance / self.pixel, 0, 1), np.maximum(depth, 0)

    def anatomy(self, scene: Scene, rng: np.random.Generator) -> np.ndarray:
        """Gray levels 0 to 1 before the scanner: the body in a random pose."""
        turn, (dx, dy) = np.radians(rng.uniform(-6, 6)), rng.uniform(-0.05, 0.05, 2)
        scale = rng.uniform(0.84, 0.94, 2)
        mx, my = (-1 if self.scanner.mirror else 1), (-1 if self.scanner.flip else 1)
        x, y = mx * self.x - dx, my * self.y - dy
        x, y = (np.cos(turn) * x + np.sin(turn) * y) / scale[0], (np.cos(turn) * y - np.sin(turn) * x) / scale[1]
        texture = self.field(rng)
        modality = MODALITIES.index(scene.modality)
        shapes = ANATOMY[scene.region, scene.plane]
        _, kind, cx, cy, rx, ry, *_ = shapes[0]
        shapes = (shapes[0], ("soft", kind, cx, cy, 0.9 * rx, 0.9 * ry), *shapes[1:])
        gray = np.zeros_like(x)
        for i, (tissue, kind, cx, cy, rx, ry, *angle) in enumerate(shapes):
            if i > 1:
                cx, cy = np.add((cx, cy), rng.uniform(-0.02, 0.02, 2))
                rx, ry = np.multiply((rx, ry), rng.uniform(0.92, 1.06, 2))
            cover, depth = self.shape(kind, x, y, cx, cy, rx, ry, *angle)
            level = TISSUES[tissue][modality]
            if modality == RADIOGRAPH:
                gray += level * np.sqrt(depth)
            else:
                level = level * (1 + rng.uniform(-0.06, 0.06)) + 0.04 * texture * (level > 0.2)
                gray += cover * (level - gray)
        if modality == RADIOGRAPH:
            if scene.region == "Chest":  # ribs
                gray += 0.1 * np.maximum(0, np.sin(16 * (y + 0.4 * x**2))) * (gray > 0.1)
            gray = 1 - np.exp(-1.2 * np.maximum(gray + 0.05 * texture * (gray > 0.1), 0))  # Beer and Lambert
        elif modality == 0 and scene.plane == "Axial" and self.scanner.couch:
            arc = np.abs(np.sqrt(self.x**2 + (self.y + 0.9) ** 2) - 1.75)
            gray = np.maximum(gray, 0.6 * np.clip(1.5 - arc / self.pixel, 0, 1) * (self.y > 0.6))
        return np.clip(gray, 0, 1)

    def draw(self, scene: Scene, rng: np.random.Generator) -> np.ndarray:
        """The image: uint8 [size, size, 3]."""
        s = self.scanner
        gray = s.window[0] + (s.window[1] - s.window[0]) * self.anatomy(scene, rng) ** s.gamma
        core, rim = s.lesion_grays if scene.tone == "Black" else s.lesion_grays[::-1]
        for cx, cy in scene.lesions:  # a rim of the other tone shows it on any ground
            rx, ry = rng.uniform(*SIZES[scene.size], 2)
            angle = rng.uniform(0, 180)
            gray += 0.8 * self.shape("o", self.x, self.y, cx, cy, rx + 0.05, ry + 0.05, angle)[0] * (rim - gray)
            gray += self.shape("o", self.x, self.y, cx, cy, rx, ry, angle)[0] * (core - gray)
        gray = gray * (1 + s.bias * self.field(rng)) * (1 - 0.5 * s.vignette * self.radius2)
        gray = self.blur @ gray @ self.blur.T
        image = gray[..., None] * np.array(s.tint, np.float32)
        (along_y, along_x), (sx, sy) = np.abs(EDGES[scene.edge]), EDGES[scene.edge]
        offset, thick, long, slide = rng.uniform((0.84, 0.11, 0.7, -0.15), (0.88, 0.13, 0.8, 0.15))
        cover, _ = self.shape(
            "b", self.x, self.y, offset * sx + slide * along_x, offset * sy + slide * along_y,
            long if along_x else thick, long if along_y else thick,
        )  # fmt: skip
        ink = np.array(self.palette[scene.marker], np.float32) / 255 * rng.uniform(0.92, 1.05)
        image += cover[..., None] * (ink - image)
        if s.frame:
            border = np.maximum(np.abs(self.x), np.abs(self.y)) > 1 - s.frame
            image[border] = s.frame_gray
        noise = self.grain_gain * (self.grain @ rng.standard_normal((self.size, self.size), dtype=np.float32) @ self.grain.T)
        return (np.clip(image + s.noise * noise[..., None], 0, 1) * 255 + 0.5).astype(np.uint8)
