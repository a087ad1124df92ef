package segment

import (
	"errors"
	"fmt"
	"slices"
	"time"
)

// Window is a part of each week as the clocks of one time zone show it: it holds at every moment at which they show a
// day and a time in it. So an hour that they leave out when they are put forward is never in it, and one that they show
// twice when they are put back is in it twice.
type Window struct {
	Days []time.Weekday // on which it begins, sorted; none: it never holds
	From TimeOfDay
	To   TimeOfDay      // the first minute that is not in it; on the next day, unless it is later than From
	Zone *time.Location // nil: UTC
}

// TimeOfDay is what a clock shows, in minutes since midnight.
type TimeOfDay int

// endOfDay is 24:00.
const endOfDay TimeOfDay = 24 * 60

// ParseTimeOfDay reads "00:00" to "23:59" and, as the end of a day, "24:00".
func ParseTimeOfDay(s string) (TimeOfDay, error) {
	if s == "24:00" {
		return endOfDay, nil
	}
	t, err := time.Parse("15:04", s)
	if err != nil || len(s) != len("15:04") {
		return 0, errors.New(`it is not a time of day like "08:00"`)
	}
	return TimeOfDay(t.Hour()*60 + t.Minute()), nil
}

func (t TimeOfDay) String() string { return fmt.Sprintf("%02d:%02d", int(t)/60, int(t)%60) }

// String returns the window in words: "Mon Tue 08:00 to 18:00 Europe/Berlin".
func (w Window) String() string {
	days := ""
	if len(w.Days) < 7 {
		for _, day := range w.Days {
			days += day.String()[:3] + " "
		}
	}
	return fmt.Sprintf("%s%s to %s %s", days, w.From, w.To, w.zone())
}

func (w Window) local(now time.Time) time.Time {
	if w.Zone == nil {
		return now.UTC()
	}
	return now.In(w.Zone)
}

// Holds reports whether the moment is in the window.
func (w Window) Holds(now time.Time) bool {
	local := w.local(now)
	shows := TimeOfDay(local.Hour()*60 + local.Minute())
	today, yesterday := w.begins(local.Weekday()), w.begins(local.Weekday()+6)
	if w.From < w.To {
		return today && w.From <= shows && shows < w.To
	}
	return today && w.From <= shows || yesterday && shows < w.To
}

func (w Window) begins(day time.Weekday) bool { return slices.Contains(w.Days, day%7) }

// edge returns a moment after now, not later than the next one at which the window begins or ends: that moment, as long
// as the clocks are not put forward or back before; zero: there is none.
func (w Window) edge(now time.Time) time.Time {
	local := w.local(now)
	midnight := now.Unix() - int64(local.Hour()*3600+local.Minute()*60+local.Second())
	_, next := local.ZoneBounds()
	length := w.To - w.From
	if length <= 0 {
		length += endOfDay
	}
	for day := -1; day <= 7; day++ {
		if !w.begins(local.Weekday() + time.Weekday(day+7)) {
			continue
		}
		begin := time.Unix(midnight+int64(day)*24*3600+int64(w.From)*60, 0)
		for _, at := range []time.Time{begin, begin.Add(time.Duration(length) * time.Minute)} {
			next = sooner(next, at, now)
		}
	}
	return next
}

// sooner is the earlier of two moments, if the second is one after now. Zero is never.
func sooner(next, at, now time.Time) time.Time {
	if !at.IsZero() && at.After(now) && (next.IsZero() || at.Before(next)) {
		return at
	}
	return next
}

// Holds reports whether the grant is in force at a moment, and until when that is sure: at that moment or later time
// alone changes it; zero: never.
func (g *Grant) Holds(now time.Time) (holds bool, until time.Time) {
	switch {
	case !g.Expires.IsZero() && !now.Before(g.Expires):
		return false, time.Time{}
	case now.Before(g.NotBefore):
		return false, g.NotBefore
	}
	holds, until = len(g.Windows) == 0, g.Expires
	for i := range g.Windows {
		holds = holds || g.Windows[i].Holds(now)
		until = sooner(until, g.Windows[i].edge(now), now)
	}
	return holds, until
}

// equal reports whether both windows say the same.
func (w Window) equal(other Window) bool {
	return slices.Equal(w.Days, other.Days) && w.From == other.From && w.To == other.To && w.zone() == other.zone()
}

func (w Window) zone() string {
	if w.Zone == nil {
		return time.UTC.String()
	}
	return w.Zone.String()
}

// SameWindows reports whether two grants hold at the same parts of each week, as far as their windows are the same.
func (g *Grant) SameWindows(other *Grant) bool {
	return slices.EqualFunc(g.Windows, other.Windows, Window.equal)
}
