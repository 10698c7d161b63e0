// A block's panels with the softmax of one beside the products of its neighbours, where V has a tile unit.
//
// In the time of panel i's softmax the tile unit does the value product of panel i - 1 and then the scores of panel i + 1,
// which take the place of the weights of panel i - 1: two blocks of scores are enough. It is for panels of which every key
// counts or the causal limit alone decides: functions, masks and dropout have more to do between the two products, and their
// panels go one after another (advance).
#pragma once

#include "attention_tile.hpp"

namespace {

template <class V, int DT, bool PAIRS, int NQ>
bool Tile<V, DT, PAIRS, NQ>::overlaps() const {
  const bool asked =
      this->state_ == BlockRows::kMixed || (this->state_ == BlockRows::kPartial && p_.has_mask_mod);
  return !asked && c_.mask_kind == THAL_MASK_NONE && !p_.has_score_mod && !c_.dropout;
}

template <class V, int DT, bool PAIRS, int NQ>
void Tile<V, DT, PAIRS, NQ>::advance_together() {
  const auto seen = [this](int64_t panel) { return smaller(count_, limit_[panel * W + W - 1] - key0_); };
  int64_t panel = 0;
  while (panel < panels_ && seen(panel) <= 0) ++panel;  // later rows see more
  if (panel == panels_) return;
  if (!this->loaded_) this->load_keys();
  if (!values_loaded_) load_values();
  float* const home = scores_;
  const auto block = [&](int64_t i) { return home + i % 2 * thal::kTileKeyBlock * W; };
  const auto ask_scores = [&](int64_t i) {
    background_.begin_scores(this->keys_, this->key_stride_, seen(i), this->q_ + i * this->words_ * W, this->words_, block(i));
  };
  alignas(64) float top[W], alpha[2][W];
  ask_scores(panel);
  background_.finish(top);
  for (; panel < panels_; ++panel) {
    if (panel + 1 < panels_) ask_scores(panel + 1);
    const int64_t n = seen(panel);
    const Partial partial = limit_[panel * W] < key0_ + n ? Partial::kCausal : Partial::kNone;
    float* fade = alpha[panel % 2];
    scores_ = block(panel);
    if (partial == Partial::kNone) {
      soften<Partial::kNone>(panel, n, top, fade);
    } else {
      soften<Partial::kCausal>(panel, n, top, fade);
    }
    background_.finish(top);
    if (meets_wild(n, partial)) {
      add_values(panel, n, fade, partial);
    } else {
      background_.begin_values(values_, c_.Ev, scores_, (n + 1) / 2, o_ + panel * W * c_.Ev, fade);
    }
  }
  background_.finish(top);
  scores_ = home;
}

}  // namespace
