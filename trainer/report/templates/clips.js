// Clips of the page play in step: the first one leads, and one button and one slider rule all. Controls of their own would cover captions.
const clips = [...document.querySelectorAll("video")];
const [lead, ...others] = clips;
const button = document.getElementById("play");
const place = document.getElementById("place");
const turn = () => (lead.paused ? lead.play().catch(() => {}) : lead.pause());
const follow = (always) => {
  button.textContent = lead.paused ? "Play clips" : "Pause clips";
  if (lead.duration) place.value = lead.currentTime / lead.duration;
  for (const clip of others) {
    if (always || Math.abs(clip.currentTime - lead.currentTime) > 0.1) clip.currentTime = lead.currentTime;
    if (lead.paused !== clip.paused) lead.paused ? clip.pause() : clip.play().catch(() => {});
  }
};
for (const event of ["play", "pause", "seeked"]) lead.addEventListener(event, () => follow(true));
lead.addEventListener("timeupdate", () => follow(false));
button.addEventListener("click", turn);
for (const clip of clips) clip.addEventListener("click", turn);
place.addEventListener("input", () => {
  lead.pause();
  if (lead.duration) lead.currentTime = place.value * lead.duration;
});
if (!matchMedia("(prefers-reduced-motion: reduce)").matches) lead.play().catch(() => {});
