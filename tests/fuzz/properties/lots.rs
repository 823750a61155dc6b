//! Draws lots, decided by one byte of the input.

pub struct Lots(u64);

impl Lots {
    pub fn new(seed: u8) -> Self {
        Self(u64::from(seed) | 1 << 40)
    }

    /// 0 to `end - 1`.
    pub fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % end.max(1)
    }
}

/// How a stream arrives.
pub enum Arrival {
    /// As much at once as is wanted.
    AsWanted,
    /// In pieces of any length.
    InPieces(Lots),
}

impl Arrival {
    /// Length of the next piece, if `most` bytes are there and wanted.
    pub fn next(&mut self, most: usize) -> usize {
        match self {
            Self::AsWanted => most,
            // Short ones are the interesting ones.
            Self::InPieces(lots) => most.min(1 + if lots.below(2) == 0 { lots.below(4) } else { lots.below(most) }),
        }
    }
}

/// A stream cut into pieces.
pub fn pieces(stream: &[u8], lots: Lots) -> Vec<&[u8]> {
    let mut arrival = Arrival::InPieces(lots);
    let (mut rest, mut pieces) = (stream, Vec::new());
    while !rest.is_empty() {
        let (piece, later) = rest.split_at(arrival.next(rest.len()));
        pieces.push(piece);
        rest = later;
    }
    pieces
}
