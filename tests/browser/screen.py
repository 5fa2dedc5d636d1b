"""What is looked at on every page: what stands out of it, and how small its letters are."""

SIZES = {"desk": (1280, 900), "phone": (360, 800)}
SMALLEST_LETTERS = 9.0  # px, as drawn

# What stands out of the page to the right, unless a box around it scrolls.
OVERFLOWING = """() => [...document.querySelectorAll("body *")].filter(element => {
    if (element.closest(".wide, pre, details:not([open])")) return false;
    const box = element.getBoundingClientRect();
    return box.width > 0 && box.right > innerWidth + 1;
}).map(element => element.tagName + "." + element.className)"""
LETTERS = """() => Math.min(...[...document.querySelectorAll("body *")].filter(element =>
    [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim())
    && element.getClientRects().length
).map(element => {
    const svg = element.closest("svg");
    const scale = svg ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;
    return parseFloat(getComputedStyle(element).fontSize) * scale;
}))"""
