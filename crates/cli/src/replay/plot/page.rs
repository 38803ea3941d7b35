//! The paper, and what is drawn with.
//!
//! plotters counts in whole pixels. Here a pixel is a tenth of a millimetre: fine enough, and lengths can be read.

use anyhow::Context;
use plotters::coord::Shift;
use plotters::element::DashedPathElement;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

/// How wide a figure is: an A4 page less margins of 15 mm.
pub(super) const WIDTH: u32 = 1800;
/// What is left free at both sides.
const MARGIN: u32 = 10;
/// How high the strip above a panel is, with its heading and its legend.
pub(super) const HEADING: u32 = 92;
/// How high the strip above one of several panels is, with its name.
pub(super) const NAME: u32 = 54;
/// How high the strip below a panel is, with the labels of its axis and what they mean.
pub(super) const BELOW: u32 = 110;
/// How wide the strip beside a panel is that has the labels of its axis and what they mean.
pub(super) const BESIDE: u32 = 170;
/// How wide a letter is at [`TEXT`], or wider.
const LETTER: i32 = 19;
/// The size of all ordinary text, in points. Nothing is smaller.
const TEXT: f64 = 9.0;
/// How long a line in a legend is.
const SAMPLE: i32 = 70;

pub(super) const BLUE: RGBColor = RGBColor(0, 114, 178);
pub(super) const VERMILION: RGBColor = RGBColor(213, 94, 0);
const GREEN: RGBColor = RGBColor(0, 130, 95);
pub(super) const GREY: RGBColor = RGBColor(228, 228, 228);
const GRID: RGBColor = RGBColor(214, 214, 214);
const AXIS: RGBColor = RGBColor(60, 60, 60);

pub(super) type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
pub(super) type Drawn = anyhow::Result<()>;

/// Text of so many points, black.
fn text_of(points: f64, style: FontStyle) -> TextStyle<'static> {
    // A point is 0.3528 mm; the backend divides what it is given by 1.24.
    let size = points * 3.528 * 1.24;
    FontDesc::new(FontFamily::SansSerif, size, style).color(&BLACK)
}

pub(super) fn text() -> TextStyle<'static> {
    text_of(TEXT, FontStyle::Normal)
}

pub(super) fn bold() -> TextStyle<'static> {
    text_of(TEXT, FontStyle::Bold)
}

fn large() -> TextStyle<'static> {
    text_of(12.0, FontStyle::Bold)
}

/// A line of so many tenths of a millimetre.
pub(super) fn line(color: RGBColor, width: u32) -> ShapeStyle {
    ShapeStyle::from(color).stroke_width(width)
}

/// A light area of a colour.
pub(super) fn light(color: RGBColor) -> ShapeStyle {
    color.mix(0.22).filled()
}

/// At most so many letters, and only such as XML and a line have room for.
pub(super) fn fitting(words: &str, letters: usize) -> String {
    let words: Vec<char> =
        words.chars().map(|letter| if letter.is_control() { '\u{fffd}' } else { letter }).collect();
    if words.len() <= letters {
        return words.into_iter().collect();
    }
    // The end of a path says more than its beginning.
    let kept = &words[words.len() - letters.saturating_sub(1)..];
    std::iter::once('…').chain(kept.iter().copied()).collect()
}

/// Draws a figure: its title in the first line, then what `draw` puts below it, on so much height.
///
/// # Errors
/// The library refuses to draw, which it has no reason to.
pub(super) fn figure(
    title: &str,
    height: u32,
    draw: impl FnOnce(&Area<'_>) -> Drawn,
) -> anyhow::Result<String> {
    const TITLE: u32 = 75;
    let height = height.saturating_add(TITLE);
    let mut picture = String::new();
    {
        let root = SVGBackend::with_string(&mut picture, (WIDTH, height)).into_drawing_area();
        root.fill(&WHITE)?;
        let page = root.margin(0u32, 0u32, MARGIN, MARGIN);
        // Large letters are wider.
        page.draw_text(&fitting(title, 72), &large(), (0, 8))?;
        let (_, below) = page.split_vertically(TITLE);
        draw(&below)?;
        root.present()?;
    }
    // The backend says pixels where millimetres are meant, and says nothing to those who cannot see.
    let (_, drawn) = picture.split_once('>').context("the drawing has no beginning")?;
    let (millimetres, high) = (f64::from(WIDTH) / 10.0, f64::from(height) / 10.0);
    let title = fitting(title, 200).replace('&', "&amp;").replace('<', "&lt;");
    Ok(format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{millimetres}mm\" height=\"{high}mm\" \
         viewBox=\"0 0 {WIDTH} {height}\" role=\"img\">\n<title>{title}</title>{drawn}"
    ))
}

/// The kinds of calls, which look the same in all figures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Map,
    Unmap,
    Dma,
}

impl Kind {
    pub(super) const ALL: [Kind; 3] = [Kind::Map, Kind::Unmap, Kind::Dma];

    /// The one of three that is this kind's.
    pub(super) fn of<T>(self, map: T, unmap: T, dma: T) -> T {
        match self {
            Kind::Map => map,
            Kind::Unmap => unmap,
            Kind::Dma => dma,
        }
    }

    pub(super) fn name(self) -> &'static str {
        self.of("map", "unmap", "DMA")
    }

    pub(super) fn color(self) -> RGBColor {
        self.of(BLUE, VERMILION, GREEN)
    }

    pub(super) fn marker(self) -> Marker {
        self.of(Marker::Disc, Marker::Triangle, Marker::Cross)
    }

    pub(super) fn is_dashed(self) -> bool {
        self == Kind::Unmap
    }
}

/// What stands in a legend before its words.
#[derive(Clone, Copy)]
pub(super) enum Sample {
    /// A line.
    Line(ShapeStyle),
    /// A dashed line.
    Dashed(ShapeStyle),
    /// A line at the upper end of an area.
    Area(ShapeStyle, ShapeStyle),
    /// A line and a marker on it, dashed or not.
    Marked(ShapeStyle, bool, Marker),
    /// A marker alone.
    Marker(ShapeStyle, Marker),
    /// A bar with an edge.
    Bar(ShapeStyle, ShapeStyle),
}

/// Shapes that differ without colours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Marker {
    Disc,
    Circle,
    Triangle,
    Cross,
    Tick,
}

impl Marker {
    /// Draws it.
    pub(super) fn draw(self, area: &Area<'_>, (x, y): (i32, i32), style: ShapeStyle) -> Drawn {
        let (filled, hollow) = (style.filled(), ShapeStyle { filled: false, ..style.stroke_width(4) });
        let middle = (x, y);
        match self {
            Marker::Disc => area.draw(&Circle::new(middle, 8, filled))?,
            Marker::Circle => {
                area.draw(&Circle::new(middle, 9, WHITE.filled()))?;
                area.draw(&Circle::new(middle, 9, hollow))?;
            }
            Marker::Triangle => area.draw(&TriangleMarker::new(middle, 12, filled))?,
            Marker::Cross => area.draw(&Cross::new(middle, 8, hollow))?,
            Marker::Tick => {
                area.draw(&PathElement::new([(x, y - 14), (x, y + 14)], hollow.stroke_width(6)))?;
            }
        }
        Ok(())
    }
}

/// Writes the heading of a panel, and its legend at the right end of the same line.
pub(super) fn heading(area: &Area<'_>, words: &str, legend: &[(Sample, &str)]) -> Drawn {
    let middle = HEADING as i32 - 36;
    let centred = |style: TextStyle<'static>| style.pos(Pos::new(HPos::Left, VPos::Center));
    area.draw_text(words, &centred(bold()), (0, middle))?;
    let width = |words: &str| SAMPLE + 14 + words.chars().count() as i32 * LETTER + 36;
    let (across, _) = area.dim_in_pixel();
    let mut x = across as i32 - legend.iter().map(|(_, words)| width(words)).sum::<i32>();
    for (sample, words) in legend {
        let (end, up, down) = (x + SAMPLE, middle - 12, middle + 12);
        let ends = [(x, middle), (end, middle)];
        let at = (x + SAMPLE / 2, middle);
        match *sample {
            Sample::Line(style) => area.draw(&PathElement::new(ends, style))?,
            Sample::Dashed(style) => dashed(area, &ends, style)?,
            Sample::Area(edge, fill) => {
                area.draw(&Rectangle::new([(x, up), (end, down)], fill))?;
                area.draw(&PathElement::new([(x, up), (end, up)], edge))?;
            }
            Sample::Marked(style, is_dashed, marker) => {
                if is_dashed {
                    dashed(area, &ends, style)?;
                } else {
                    area.draw(&PathElement::new(ends, style))?;
                }
                marker.draw(area, at, style)?;
            }
            Sample::Marker(style, marker) => marker.draw(area, at, style)?,
            Sample::Bar(edge, fill) => {
                area.draw(&Rectangle::new([(x, up), (end, down)], fill))?;
                area.draw(&Rectangle::new([(x, up), (end, down)], edge))?;
            }
        }
        area.draw_text(words, &centred(text()), (end + 14, middle))?;
        x += width(words);
    }
    Ok(())
}

/// Writes the name of one of several panels above it; what is below is the panel's.
pub(super) fn named<'a>(area: &Area<'a>, name: &str, left: u32) -> anyhow::Result<Area<'a>> {
    area.draw_text(name, &bold(), (left as i32, 4))?;
    Ok(area.split_vertically(NAME).1)
}

/// Draws a dashed line through points of the paper.
pub(super) fn dashed(area: &Area<'_>, points: &[(i32, i32)], style: ShapeStyle) -> Drawn {
    area.draw(&DashedPathElement::new(points.iter().copied(), 16, 11, style))?;
    Ok(())
}

/// What is written at an axis.
pub(super) struct Axis<'a> {
    /// How many labels there are at most.
    pub(super) labels: usize,
    /// A tick's label.
    pub(super) label: &'a dyn Fn(&f64) -> String,
    /// What the numbers are.
    pub(super) means: &'a str,
}

/// Draws the grid and the axes of a chart. The strips beside it decide which labels there are.
pub(super) fn axes<'a, X, Y>(
    chart: &mut ChartContext<'a, SVGBackend<'a>, Cartesian2d<X, Y>>,
    x: &Axis<'_>,
    y: &Axis<'_>,
) -> Drawn
where
    X: Ranged<ValueType = f64> + plotters::coord::ranged1d::ValueFormatter<f64>,
    Y: Ranged<ValueType = f64> + plotters::coord::ranged1d::ValueFormatter<f64>,
{
    chart
        .configure_mesh()
        .x_labels(x.labels)
        .y_labels(y.labels)
        .x_label_formatter(x.label)
        .y_label_formatter(y.label)
        .x_desc(x.means)
        .y_desc(y.means)
        .label_style(text())
        .axis_desc_style(text())
        .axis_style(line(AXIS, 3))
        .bold_line_style(line(GRID, 2))
        .max_light_lines(0)
        .set_all_tick_mark_size(10)
        .draw()?;
    Ok(())
}
